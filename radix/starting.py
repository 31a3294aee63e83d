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
    tree, manager, reserve = state.tree, state.manager, state.reserve
    path = tree.match(key, namespace, limit=limit if limit > 0 else 0)
    cached, size, page_bytes = path.num_bytes, len(key), tree.page_bytes
    if size > cached:
        check_rest(key, cached)
    shared, num_pages = cached // page_bytes, -(-size // page_bytes)
    tail_len = 0 if whole_pages else cached % page_bytes // TOKEN_BYTES
    num_free = manager.available_pages_count
    first_idle = min(num_pages, shared + num_free)
    if first_idle < num_pages and not reserve.can_evict(num_pages - first_idle, path.nodes[-1] if path.nodes else None):
        return start_all(state, [Plan(seq_id, key, namespace, path, shared, tail_len, num_pages)])[0]
    # Pages that are bytes already are written to the table's memory as bytes: a fraction of what an array costs.
    memory = bytearray((num_pages + num_pages // 8 + 8) * PAGE_ID_BYTES)
    memory[: shared * PAGE_ID_BYTES] = path.pages[: shared * PAGE_ID_BYTES]
    table = np.frombuffer(memory, _INT32)
    if first_idle > shared:
        manager.take_into(table[shared:first_idle])
    forked = None
    if tail_len:
        copy = table.item(shared) if first_idle > shared else reserve.first_victim(num_pages - shared)
        forked = source_of(path, shared), copy, tail_len
        try:
            manager.copy_page_slots([forked[0]], [copy], [tail_len])
        except BaseException:
            manager.drop(table[shared:first_idle])
            raise
    run = Running(table, num_pages, (size - 1) % page_bytes // TOKEN_BYTES + 1, namespace, key)
    begun = _begin(state, seq_id, run, path, shared, forked)
    if first_idle < num_pages:
        cause = tree.clock, "start", (seq_id,), num_pages - shared, num_free, tree.num_idle_pages
        evicted = reserve.evict_next(num_pages - first_idle, cause)
        memory[first_idle * PAGE_ID_BYTES : num_pages * PAGE_ID_BYTES] = evicted
    return begun


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
        run.write(0, np.frombuffer(plan.path.pages, _INT32, first))
        forked = None
        if plan.tail_len:
            forked = plan.source, pages.item(tail), plan.tail_len
            tail += 1
            run.write(first, pages[tail - 1 : tail])
            first, end = first + 1, end - 1
        run.write(first, pages[at:end])
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
    """Makes a sequence run; pages that are to be evicted for it must follow at once. Cannot fail."""
    tree, num_cached = state.tree, shared * state.tree.page_size
    if shared:
        run.held = state.manager.hold(run.table[:shared])
    if forked is not None:
        num_cached += forked[2]
        _hold_forked(tree, run, path, shared)
    elif shared:
        node = path.nodes[-1]
        if len(path.pages) != shared * PAGE_ID_BYTES:
            node = tree.cut(node, path.num_pages, shared)
        run.node, run.num_tree_pages = node, shared
        tree.hold(node, reuses=1)
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
    source = path.nodes[-1]
    if len(path.pages) != (shared + 1) * PAGE_ID_BYTES:
        source = tree.cut(source, path.num_pages, shared + 1)
    if not shared:
        source.num_reuses += 1
        tree.stamp(source)
        return
    run.node = node = tree.cut(source, shared + 1, shared)
    run.num_tree_pages = shared
    tree.hold(node, reuses=1)
    source.num_reuses += 1
    tree.stamp_too(source)
