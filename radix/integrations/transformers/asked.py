"""What `Engine.submit` is asked for, checked before anything is queued."""

from __future__ import annotations

from typing import TYPE_CHECKING

from radix.integrations.transformers.request import Request
from radix.integrations.transformers.sampling import Draw, Sampling
from radix.integrations.transformers.text import TextStream, as_texts, as_token_set, encode
from seqattn.counts import as_count
from seqattn.errors import BadValueError, LengthError, PromptTooLargeError

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Sequence

    from radix.integrations.transformers.engine import Engine
    from radix.integrations.transformers.text import Prompt

__all__ = ["request_for"]

_GREEDY = Sampling()


def request_for(
    engine: Engine,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = _GREEDY,
    stop_tokens: Collection[int] | None = None,
    stop_texts: Sequence[str] = (),
    namespace: Hashable = None,
    request_id: Hashable = None,
) -> Request:
    """A request that is queued nowhere, and has no id yet unless it is named; `submit` says what everything means."""
    tokenizer = engine.tokenizer
    ids = encode(tokenizer, prompt, engine.shape.vocab_size)
    most = as_count("max_new_tokens", max_new_tokens, 1)
    _refuse_too_long(engine, len(ids), most)
    stops = engine.end_tokens if stop_tokens is None else as_token_set(stop_tokens)
    watch = TextStream(tokenizer, as_texts(stop_texts, tokenizer)) if stop_texts else None
    draw = Draw(sampling)
    if request_id is not None:
        engine.cache.descriptor.refuse_running(request_id)
    try:
        hash(namespace)
    except TypeError as error:
        raise BadValueError(f"namespace must be hashable, not {namespace!r}: {error}") from None
    return Request(request_id, ids, namespace, most, draw, stops, tokenizer, watch)


def _refuse_too_long(engine: Engine, num_prompt: int, max_new_tokens: int) -> None:
    num_tokens = num_prompt + max_new_tokens - 1  # the last token is never fed back
    most, page_size = engine.shape.max_positions, engine.cache.tree.page_size
    if most is not None and num_tokens > most:
        raise LengthError(
            f"{num_prompt} prompt tokens and {max_new_tokens} new ones do not fit the model's {most} positions: "
            "shorten the prompt or lower max_new_tokens"
        )
    num_pages = -(-num_tokens // page_size)
    if num_pages > engine.cache.manager.num_pages:
        raise PromptTooLargeError(num_pages, engine.cache.manager.num_pages)
