"""The checks behind `PrefixCache.check()`: who holds what, recomputed from scratch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from radix.proof import path_key, path_pages
from radix.running import Running
from radix.show import MOST_LINES, describe, draw
from seqattn.errors import InvariantError
from seqattn.page_lists import concatenate

if TYPE_CHECKING:
    from radix.node import Node
    from radix.state import State
    from seqattn.pages import PageArray, PageList

__all__ = ["check_cache"]


def check_cache(state: State, outside: PageList | None = None) -> None:
    """Recomputes P1 to P3, S1, S2, T1 to T6 and C1 to C3; O(pages + tree).

    Args:
        state: what to check.
        outside: pages held by others than this cache, one entry for each reference: the counts must be equal to what
            is known then. None: equal, unless the allocator knows of pages held by hand; at least as large then.

    Raises:
        InvariantError: naming the invariant, with the tree drawn.
    """
    state.tree.check()
    state.descriptor.check()
    tree_pages = concatenate(node.page_ids for node in state.tree)
    by_others = state.manager.as_pages(() if outside is None else outside)
    known = [state.descriptor.held_pages(), tree_pages, concatenate(pin.pages for pin in state.pins), by_others]
    exact = outside is not None or not state.manager.num_outside_refs
    state.manager.check(concatenate(known), exact=exact)
    _check_holders(state)
    _check_idle(state)
    _check_sum(state, tree_pages, by_others if exact else None)


def _check_holders(state: State) -> None:
    """C2: each node's holders are the sequences and pins whose paths go through it."""
    holders: Counter[Node] = Counter()
    for seq_id, run in state.running.items():
        _check_running(state, seq_id, run)
        _count_path(holders, run.node)
    for pin in state.pins:
        pages = path_pages(pin.node)
        if not np.array_equal(pages, pin.pages):
            _fail(state, "C2", f"a pin holds pages {pin.pages.tolist()} but its path has {pages.tolist()}")
        _count_path(holders, pin.node)
    for node in state.tree:
        if node.num_holders != holders[node]:
            _fail(state, "C2", f"{holders[node]} holders found, other than in {describe(node)}")
        holders.pop(node, None)
    if holders:
        _fail(state, "C2", f"a node that is held is not in the tree: {describe(next(iter(holders)))}")


def _count_path(holders: Counter[Node], node: Node | None) -> None:
    while node is not None and node.parent is not None:
        holders[node] += 1
        node = node.parent


def _check_running(state: State, seq_id: object, run: Running) -> None:
    """The sequence's tokens fit its pages, its leading pages are its path's, and so are their tokens."""
    page_size = state.tree.page_size
    if not isinstance(run, Running):
        _fail(state, "S1", f"sequence {seq_id!r} was put in the descriptor behind the cache's back: {run!r}")
    if run.num_ids != run.num_tokens(page_size):
        _fail(state, "S1", f"sequence {seq_id!r} has {run.num_ids} token ids but pages for another number: {run!r}")
    pages = path_pages(run.node)
    if (run.node is None) != (run.num_tree_pages == 0):
        _fail(state, "C2", f"sequence {seq_id!r} has {run.num_tree_pages} tree pages but its node is {run.node!r}")
    if len(pages) != run.num_tree_pages or not np.array_equal(pages, run.table[: len(pages)]):
        _fail(state, "C2", f"sequence {seq_id!r} holds {run!r} but its path has pages {pages.tolist()}")
    if not np.array_equal(run.tree_pages, pages):
        _fail(state, "C2", f"sequence {seq_id!r} has pages {pages.tolist()} of the tree but gives others back")
    is_looked_at = run.may_end_shared or state.manager.was_referenced_by_hand
    if not is_looked_at and run.last_page_len % page_size and state.manager.ref_count[run.last_page] > 1:
        _fail(state, "S3", f"the last page of sequence {seq_id!r} is shared, and would be written: {run!r}")
    tree_key, key = path_key(run.node), run.key(run.num_ids)
    size = min(len(tree_key), len(key))
    if tree_key[:size] != key[:size]:
        _fail(state, "C2", f"sequence {seq_id!r} holds a path with other tokens than its own")


def _check_idle(state: State) -> None:
    """C1: no sequence has a page of an idle node. With P3, evicting everything frees exactly the idle pages."""
    by_sequences = np.zeros(state.manager.num_pages, dtype=bool)
    by_sequences[state.descriptor.held_pages()] = True
    for node in state.tree:
        pages = node.page_ids
        if not node.num_holders and by_sequences[pages].any():
            held = pages[by_sequences[pages]].tolist()
            _fail(state, "C1", f"pages {held} of an idle node have other holders: {describe(node)}")


def _check_sum(state: State, tree_pages: PageArray, by_others: PageArray | None) -> None:
    """C3: every page is free, or in the tree, or a sequence's, or held by others only (None: whoever they are)."""
    manager = state.manager
    in_tree, by_sequences, elsewhere = np.zeros((3, manager.num_pages), dtype=bool)
    in_tree[tree_pages] = True
    by_sequences[state.descriptor.held_pages()] = True
    elsewhere[by_others if by_others is not None else np.flatnonzero(manager.ref_count)] = True
    held, rest = by_sequences & ~in_tree, elsewhere & ~by_sequences & ~in_tree
    total = manager.available_pages_count + int(held.sum()) + int(rest.sum()) + len(tree_pages)
    if total != manager.num_pages:
        kinds = f"{held.sum()} of sequences only, {rest.sum()} of others only, {len(tree_pages)} in the tree"
        _fail(state, "C3", f"{manager.available_pages_count} free, {kinds}: {manager.num_pages} pages in all")


def _fail(state: State, name: str, problem: str) -> None:
    raise InvariantError(name, problem, draw(state.tree, most_lines=MOST_LINES))
