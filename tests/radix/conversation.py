"""What tests of conversations need: a clock that is told the time, and an engine that computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seqattn.errors import NoPageError

if TYPE_CHECKING:
    from radix.cache import PrefixCache
    from radix.session import ChatSession


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def serve(cache: PrefixCache, session: ChatSession, answer: Sequence[int]) -> int:
    """What an engine does: computes what is not cached, answers, publishes all but the last token, which has no KV.

    Returns:
        How many tokens were reused.
    """
    request = ("request", session.id)
    started = cache.start(request, session.tokens, namespace=session.namespace)
    if len(answer) > 1:
        try:
            cache.extend([request], [list(answer[:-1])])
        except NoPageError:
            cache.abort(request)
            raise
    cache.finish(request)
    session.append(answer)
    return started.num_cached_tokens
