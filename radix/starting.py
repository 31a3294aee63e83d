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

__all__ = ["start_all"]


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
    tails, at, started = reservation.pages[: len(forks)].tolist(), len(forks), []
    for plan in plans:
        tail = tails.pop(0) if plan.tail_len else None
        end = at + plan.num_new - (tail is not None)
        started.append(_begin(state, plan, tail, reservation.pages[at:end]))
        at = end
    if reservation.victims:
        reserve.commit(reservation, "start", [plan.seq_id for plan in plans])
    return started


def _copy_tails(state: State, forks: list[Plan], pages: PageArray) -> None:
    """Copies every tail to one of the first pages, in order."""
    sources = [plan.source for plan in forks]
    state.manager.copy_page_slots(sources, pages[: len(forks)], [plan.tail_len for plan in forks])


def _begin(state: State, plan: Plan, tail: int | None, new_pages: PageArray) -> Started:
    """Makes a planned sequence run; cannot fail. `tail` is the page that its cached tail was copied to, if any."""
    shared, num_pages = plan.num_shared, plan.num_pages
    num_tokens = len(plan.key) // TOKEN_BYTES
    table = np.empty(num_pages + num_pages // 8 + 8, dtype=np.int32)
    table[num_pages - len(new_pages) : num_pages] = new_pages
    forked = None
    if tail is not None:
        table[shared] = tail
        forked = (plan.source, tail, plan.tail_len)
    page_size = state.tree.page_size
    run = Running(table, num_pages, num_tokens - (num_pages - 1) * page_size, plan.namespace, plan.key)
    if shared:
        table[:shared] = np.frombuffer(plan.path.pages, np.int32, shared)
        state.manager.hold(table[:shared])
    if plan.path.nodes:
        _hold_path(state, plan, run)
    state.descriptor.add(plan.seq_id, run)
    num_cached = shared * page_size + plan.tail_len
    if not (state.retries.aborted and state.retries.is_retry(plan.seq_id, plan.namespace, plan.key)):
        stats = state.stats
        stats.num_requests += 1
        stats.num_query_tokens += num_tokens
        stats.num_hit_tokens += num_cached
        stats.num_shared_pages += shared
        stats.num_forked_pages += tail is not None
    return Started(num_cached, shared, forked)


def _hold_path(state: State, plan: Plan, run: Running) -> None:
    """Holds the nodes of the shared pages; stamps them, and the page that the tail was copied from."""
    tree, shared = state.tree, plan.num_shared
    node, end = plan.path.nodes[-1], plan.path.num_pages
    source = None
    if plan.tail_len:
        node = source = tree.cut(node, end, shared + 1)
        end = shared + 1
    if shared:
        run.node = tree.cut(node, end, shared)
        run.num_tree_pages = shared
        tree.hold(run.node, reuses=1)
    if source is not None:
        source.num_reuses += 1
        tree.stamp(source)
