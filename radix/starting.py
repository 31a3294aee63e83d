"""Starting sequences: share the cached full pages, copy the cached part of the next, take the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from radix.running import Running, Started
from radix.tokens import TOKEN_BYTES

if TYPE_CHECKING:
    from radix.reserve import Plan
    from radix.state import State
    from seqattn.pages import PageArray

__all__ = ["start_all", "start_one"]

_INT32 = np.dtype(np.int32)


def start_one(state: State, plan: Plan) -> Started:
    """`start_all` for one sequence, without the lists that many need; raises what it raises."""
    shared, num_pages = plan.num_shared, plan.num_pages
    table = np.empty(num_pages + num_pages // 8 + 8, _INT32)
    pages = table[shared:num_pages]
    victims = state.reserve.claim(pages, plan.path.nodes)
    if victims is None:
        return start_all(state, [plan])[0]
    if plan.tail_len:
        try:
            state.manager.copy_page_slots([plan.source], [pages.item(0)], [plan.tail_len])
        except BaseException:
            state.reserve.give_back(pages, victims)
            raise
    started = _begin(state, plan, table)
    if victims:
        state.reserve.evict_named(victims)
    return started


def _room(num_pages: int) -> PageArray:
    """A page table's buffer with room to grow."""
    return np.empty(num_pages + num_pages // 8 + 8, _INT32)


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
    pages, at, started = reservation.pages, len(forks), []
    tails = iter(range(at))
    for plan in plans:
        table, first, end = _room(plan.num_pages), plan.num_shared, at + plan.num_new
        if plan.tail_len:
            table[first] = pages[next(tails)]
            first, end = first + 1, end - 1
        table[first : plan.num_pages] = pages[at:end]
        started.append(_begin(state, plan, table))
        at = end
    reserve.commit(reservation)
    return started


def _copy_tails(state: State, forks: list[Plan], pages: PageArray) -> None:
    """Copies every tail to one of the first pages, in order."""
    sources = [plan.source for plan in forks]
    state.manager.copy_page_slots(sources, pages[: len(forks)], [plan.tail_len for plan in forks])


def _begin(state: State, plan: Plan, table: PageArray) -> Started:
    """Makes a planned sequence run; cannot fail. `table` is its page table's buffer, with all but the shared pages."""
    shared, num_pages, tail_len, path = plan.num_shared, plan.num_pages, plan.tail_len, plan.path
    num_tokens, page_size = len(plan.key) // TOKEN_BYTES, state.tree.page_size
    run = Running(table, num_pages, num_tokens - (num_pages - 1) * page_size, plan.namespace, plan.key)
    if shared:
        table[:shared] = np.frombuffer(path.pages, _INT32, shared)
        state.manager.hold(table[:shared])
    if tail_len:
        _hold_path(state, plan, run)
    elif shared:
        run.node, run.num_tree_pages = node, _ = state.tree.cut(path.nodes[-1], path.num_pages, shared), shared
        state.tree.hold(node, reuses=1)
    state.descriptor.add(plan.seq_id, run)
    num_cached = shared * page_size + tail_len
    if not (state.retries.aborted and state.retries.is_retry(plan.seq_id, plan.namespace, plan.key)):
        stats = state.stats
        stats.num_requests += 1
        stats.num_query_tokens += num_tokens
        stats.num_hit_tokens += num_cached
        stats.num_shared_pages += shared
        if tail_len:
            stats.num_forked_pages += 1
    return Started(num_cached, shared, (plan.source, table.item(shared), tail_len) if tail_len else None)


def _hold_path(state: State, plan: Plan, run: Running) -> None:
    """Holds the nodes of the shared pages; stamps them, and the page that the tail was copied from."""
    tree, shared = state.tree, plan.num_shared
    source = tree.cut(plan.path.nodes[-1], plan.path.num_pages, shared + 1)
    if shared:
        run.node = node = tree.cut(source, shared + 1, shared)
        run.num_tree_pages = shared
        tree.hold(node, reuses=1)
    source.num_reuses += 1
    tree.stamp(source)
