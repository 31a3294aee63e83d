"""Putting a sequence's pages in the tree, and what that means for others.

Where the tree already holds a page for the same tokens, the sequence takes the tree's page and gives its own back. Its
forks may hold the page it gives back: they take the tree's as well, or else a page further down would have more holders
than this one. Pages that go into the tree while forks hold them make the forks holders of tree pages.

    page_size 2      sequence 1: pages [5 6 7], fork 2: the same      tree: [a b|c d] pages 3 4
    finish(2)        sequence 1: pages [3 4 7]                        tree: [a b|c d] pages 3 4 ──▶ [e f] page 7
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from radix.node import PAGE_ID_BYTES

if TYPE_CHECKING:
    from radix.node import Node
    from radix.running import Running
    from radix.state import State
    from radix.tree import Inserted
    from seqattn.pages import PageArray

__all__ = ["hand_over", "publish", "put"]


def put(state: State, run: Running, num_tokens: int) -> Inserted:
    """Puts the first `num_tokens` tokens of a sequence in the tree.

    On return others hold what they must; the references of `run` itself, and the tree's to its new pages, are for the
    caller to settle: of the pages from `run.num_tree_pages` on, the first `num_known` are to be given back, the next,
    up to the length of `pages`, are the tree's now, and the rest are not.
    """
    at, page_size = run.num_tree_pages, state.tree.page_size
    own: PageArray = run.table[at : -(-num_tokens // page_size)]
    sharers = _sharers(state, run, own)
    is_partial = run.node is not None and len(run.node.key) % state.tree.page_bytes
    key = run.key(num_tokens, (at - 1 if is_partial else at) * page_size)
    done = state.tree.insert(key, own.tobytes(), run.namespace, under=run.node)
    if done.replaced is not None:
        _replace(state, *done.replaced)
    for other in sharers:
        _share(state, other, own, done)
    state.stats.num_adopted_pages += done.num_known
    return done


def _sharers(state: State, run: Running, own: PageArray) -> list[Running]:
    """Other sequences that hold the first of these pages.

    Who holds a page holds those before it, so the first page tells; only if its count is above one is it worth looking.
    """
    if not len(own) or state.manager.ref_count.item(own.item(0)) < 2:
        return []
    at = run.num_tree_pages
    return [
        other
        for other in state.running.values()
        if other is not run and other.num_pages > at and other.table[at] == own[0]
    ]


def _share(state: State, other: Running, own: PageArray, done: Inserted) -> None:
    """`other` holds the first few of `own`: it takes the tree's in their place and holds the nodes that it now has."""
    at = other.num_tree_pages
    pages = np.frombuffer(done.pages, dtype=np.int32)
    own = own[: len(pages)]
    table = other.table[at : at + len(own)]
    same = table == own[: len(table)]
    count = len(table) if same.all() else int(same.argmin())
    if not count:  # the tree had these tokens as part of more, and took nothing
        return
    adopted = min(count, done.num_known)
    if adopted:
        state.manager.hold(pages[:adopted])
        state.manager.drop(own[:adopted])
        other.write(at, pages[:adopted])
        state.descriptor.note_rewrite()
    node = state.tree.cut(done.node, at + len(pages), at + count)
    state.tree.hold(node, other.node)
    other.node, other.num_tree_pages = node, at + count


def _replace(state: State, old_page: int, leaf: Node) -> None:
    """A fuller page took the place of a leaf's last one: the tree's reference goes, and every pin's moves.

    A sequence that holds the old page holds it for tokens of its own after those of the leaf; that page is not in the
    tree any more, so the sequence holds the path up to the page before.
    """
    old = np.array([old_page], dtype=np.int32)
    new = leaf.page_ids[:1] if leaf.num_holders else leaf.page_ids[-1:]
    if leaf.num_holders:
        for pin in state.pins:
            if pin.node is leaf:
                state.manager.hold(new)
                state.manager.drop(old)
                pin.pages = np.append(pin.pages[:-1], new)
        for run in state.running.values():
            if run.node is leaf:
                above: Node = leaf.parent  # type: ignore[assignment]  # never a root
                state.tree.release(leaf, above)
                run.node = above if above.parent is not None else None
                run.num_tree_pages -= 1
                run.held = None
    state.manager.drop(old)


def publish(state: State, run: Running, num_tokens: int) -> None:
    """Puts the first `num_tokens` tokens, full pages, in the tree; the sequence goes on and holds what it held."""
    at = run.num_tree_pages
    own = run.table[at : num_tokens // state.tree.page_size]
    if _append(state, run, num_tokens, own):
        state.manager.hold(own)
        state.tree.stamp(run.node)  # type: ignore[arg-type]  # there was a node to append to
        run.num_tree_pages += len(own)
        return
    done = put(state, run, num_tokens)
    pages, known = np.frombuffer(done.pages, dtype=np.int32), done.num_known
    own = run.table[at : at + len(pages)]
    state.manager.hold(own[known:])
    if known:
        state.manager.hold(pages[:known])
        state.manager.drop(own[:known])
        run.write(at, pages[:known])
        state.descriptor.note_rewrite()
    state.tree.hold(done.node, run.node)
    run.node, run.num_tree_pages = done.node, at + len(pages)


def hand_over(state: State, run: Running, num_tokens: int) -> PageArray | None:
    """Puts the first `num_tokens` tokens in the tree, which takes over the references to its new pages.

    Returns:
        Those of the sequence's pages from `run.num_tree_pages` on, int32, whose references are still to be given back;
        None for none.
    """
    at, table = run.num_tree_pages, run.table
    last = -(-num_tokens // state.tree.page_size)
    if _append(state, run, num_tokens, table[at:last]):
        return table[last:] if last < run.num_pages else None
    done = put(state, run, num_tokens)
    first, last = at + done.num_known, at + len(done.pages) // PAGE_ID_BYTES
    return np.concatenate((table[at:first], table[last:]))


def _append(state: State, run: Running, num_tokens: int, own: PageArray) -> bool:
    """The most common case: the deepest node that the sequence holds is its alone, and grows in place."""
    node = run.node
    if node is None or node.num_holders > 1 or not len(own) or state.manager.ref_count.item(own.item(0)) > 1:
        return False
    key = run.key(num_tokens, run.num_tree_pages * state.tree.page_size)
    gone = state.tree.append(node, key, own.tobytes())
    if gone:
        state.manager.drop_one(int.from_bytes(gone, sys.byteorder))
    return gone is not None
