"""Equal prompts that nobody has computed yet are computed once: the others wait for what the first one publishes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from radix.tokens import TOKEN_BYTES, common_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from radix.cache import PrefixCache
    from radix.integrations.transformers.request import Request

__all__ = ["waits_for_another"]


def waits_for_another(request: Request, running: Sequence[Request], cache: PrefixCache) -> bool:
    """Whether a request that is being computed will soon publish more of this prompt than the cache has.

    Args:
        request: that is to start; it remembers whom it waits for.
        running: those that run.
        cache: where they publish.
    """
    page_size = cache.tree.page_size
    if request.leader is not None and _is_ahead(*request.leader, running, page_size):
        return True
    request.leader = None
    leaders = [r for r in running if r.is_prefilling and r.namespace == request.namespace]
    useful = [(_num_useful(request, leader, page_size), leader) for leader in leaders]
    num_useful, leader = max(useful, key=lambda pair: pair[0], default=(0, request))
    if num_useful < page_size or not _is_ahead(leader, num_useful, running, page_size):
        return False
    num_cached = cache.match(request.todo, namespace=request.namespace).num_tokens
    if num_useful - num_cached >= page_size:
        request.leader = leader, num_useful
    return request.leader is not None


def _num_useful(request: Request, leader: Request, page_size: int) -> int:
    """Tokens of a prompt that another's full pages will hold."""
    full = leader.todo[: len(leader.todo) // page_size * page_size].tobytes()
    return min(common_bytes(full, request.todo.tobytes()) // TOKEN_BYTES, len(request.todo) - 1)


def _is_ahead(leader: Request, num_tokens: int, running: Sequence[Request], page_size: int) -> bool:
    """Whether a request is still to publish the first `num_tokens` tokens of its prompt."""
    return leader.is_prefilling and leader in running and leader.num_done // page_size * page_size < num_tokens
