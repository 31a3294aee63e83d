"""Starting sequences: share the cached full pages, copy the cached part of the next, take the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from radix.node import PAGE_ID_BYTES
from radix.plan import Plan, source_of
from radix.running import Running, Started, started
from radix.tokens import TOKEN_BYTES, check_rest

if TYPE_CHECKING:
    from collections.abc import Hashable

    from radix.state import State
    from radix.tree import Path, RadixTree
    from seqattn.pages import PageArray

__all__ = ["start_all", "start_one"]

_INT32 = np.dtype(np.int32)


def start_one(
    state: State, seq_id: Hashable, key: bytes, namespace: Hashable, limit: int, *, whole_pages: bool
) -> Started:
    """`start_all` for one sequence, in one go: only if pages are short is there something to plan.

    Args:
        state: of the cache.
        seq_id: an id that is not running.
        key: the prompt's tokens, not empty.
        namespace: under which root.
        limit: bytes of the key that may be reused, less than none for none.
        whole_pages: share full pages only, fork no tail.
    """
    tree = state.tree
    path = tree.match(key, namespace, limit=limit if limit > 0 else 0)
    cached, size, page_bytes = path.num_bytes, len(key), tree.page_bytes
    check_rest(key, cached)
    shared, num_pages = cached // page_bytes, -(-size // page_bytes)
    tail_len = 0 if whole_pages else cached % page_bytes // TOKEN_BYTES
    table = np.empty(num_pages + num_pages // 8 + 8, _INT32)
    pages = table[shared:num_pages]
    num_free = state.manager.available_pages_count
    victims = state.reserve.claim(pages, path.nodes[-1] if path.nodes else None)
    if victims is None:
        return start_all(state, [Plan(seq_id, key, namespace, path, shared, tail_len, num_pages)])[0]
    run = Running(table, num_pages, (size - 1) % page_bytes // TOKEN_BYTES + 1, namespace, key)
    forked = None
    if tail_len:
        source, copy = source_of(path, shared), pages.item(0)
        try:
            state.manager.copy_page_slots([source], [copy], [tail_len])
        except BaseException:
            state.reserve.give_back(pages, victims)
            raise
        forked = source, copy, tail_len
    result = _begin(state, seq_id, run, path, shared, forked)
    if victims:
        state.reserve.evict_named(victims, "start", (seq_id,), len(pages), num_free)
    return result


def start_all(state: State, plans: list[Plan]) -> list[Started]:
    """Starts planned sequences, all or none, with one copy for all tails.

    Raises:
        PromptTooLargeError: one needs more pages than the whole cache has.
        NoPageError: together they need more than are free or idle; nothing has changed.
    """
    reserve = state.reserve
    kept = reserve.fit(plans)
    reservation = reserve.reserve(sum([plan.num_new for plan in plans]), kept)
    forks = [plan for plan in plans if plan.tail_len]
    if forks:
        try:
            _copy_tails(state, forks, reservation.pages)
        except BaseException:
            reserve.cancel(reservation)
            raise
    pages, at, begun = reservation.pages, len(forks), list[Started]()
    tail = 0
    for plan in plans:
        run = Running.of(plan.num_pages, state.tree.page_size, plan.namespace, plan.key)
        first, end = plan.num_shared, at + plan.num_new
        forked = None
        if plan.tail_len:
            forked = plan.source, pages.item(tail), plan.tail_len
            tail += 1
            run.table[first] = forked[1]
            first, end = first + 1, end - 1
        run.table[first:] = pages[at:end]
        begun.append(_begin(state, plan.seq_id, run, plan.path, plan.num_shared, forked))
        at = end
    if reservation.victims:
        reserve.commit(reservation, "start", [plan.seq_id for plan in plans])
    return begun


def _copy_tails(state: State, forks: list[Plan], pages: PageArray) -> None:
    """Copies every tail to one of the first pages, in order."""
    sources = [plan.source for plan in forks]
    state.manager.copy_page_slots(sources, pages[: len(forks)], [plan.tail_len for plan in forks])


def _begin(
    state: State, seq_id: Hashable, run: Running, path: Path, shared: int, forked: tuple[int, int, int] | None
) -> Started:
    """Makes a sequence run whose table has all but the shared pages; cannot fail."""
    num_cached = shared * state.tree.page_size
    if shared:
        held = np.frombuffer(path.pages, _INT32, shared)
        run.table[:shared] = held
        state.manager.hold(held)
    if forked is not None:
        num_cached += forked[2]
        _hold_forked(state.tree, run, path, shared)
    elif shared:
        node = path.nodes[-1]
        if len(path.pages) != shared * PAGE_ID_BYTES:
            node = state.tree.cut(node, path.num_pages, shared)
        run.node, run.num_tree_pages = node, shared
        state.tree.hold(node, reuses=1)
    state.descriptor.add(seq_id, run)
    if not (state.retries.aborted and state.retries.is_retry(seq_id, run.namespace, run.prompt)):
        stats = state.stats
        stats.num_requests += 1
        stats.num_query_tokens += len(run.prompt) // TOKEN_BYTES
        stats.num_hit_tokens += num_cached
        stats.num_shared_pages += shared
        if forked is not None:
            stats.num_forked_pages += 1
    return started((num_cached, shared, forked))


def _hold_forked(tree: RadixTree, run: Running, path: Path, shared: int) -> None:
    """Holds the nodes of the shared pages; stamps them, and the page that the tail was copied from."""
    source = tree.cut(path.nodes[-1], path.num_pages, shared + 1)
    if not shared:
        source.num_reuses += 1
        tree.stamp(source)
        return
    run.node = node = tree.cut(source, shared + 1, shared)
    run.num_tree_pages = shared
    tree.hold(node, reuses=1)
    source.num_reuses += 1
    tree.stamp_too(source)
