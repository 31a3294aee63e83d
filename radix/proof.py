"""The checks behind `check()`: every invariant recomputed from scratch, named by its number when it does not hold."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from radix.children import Children
from radix.show import MOST_LINES, describe, draw
from radix.tokens import TOKEN_BYTES
from seqattn.errors import InvariantError

if TYPE_CHECKING:
    import numpy.typing as npt

    from radix.node import Node
    from radix.tree import RadixTree

__all__ = ["check_tree"]


def check_tree(tree: RadixTree) -> None:
    """Recomputes T1 to T6; O(tree).

    Raises:
        InvariantError: naming the invariant, with the tree drawn.
    """
    for namespace, root in tree.roots.items():
        is_other = root.namespace is not namespace and root.namespace != namespace  # a NaN is only itself
        if root.children is None or is_other:
            _fail(tree, "T2", f"the root of namespace {namespace!r} is empty or another's")
        _check_children(tree, root)
    nodes = list(tree)
    for node in nodes:
        _check_edge(tree, node)
        _check_children(tree, node)
    pages = np.frombuffer(b"".join([node.pages for node in nodes]), dtype=np.int32)
    if len(pages) and np.bincount(pages).max() > 1:
        twice = [page for page, count in Counter(pages.tolist()).items() if count > 1]
        _fail(tree, "T3", f"pages {twice} are in the tree twice")
    _check_counters(tree, nodes, len(pages))


def _fail(tree: RadixTree, name: str, problem: str) -> None:
    raise InvariantError(name, problem, draw(tree, most_lines=MOST_LINES))


def _check_edge(tree: RadixTree, node: Node) -> None:
    """T1 for one node."""
    size = len(node.key)
    if not size or size % TOKEN_BYTES or node.num_pages != -(-size // tree.page_bytes):
        _fail(tree, "T1", f"{node.num_pages} pages do not fit {size} bytes of key: {describe(node)}")
    if size % tree.page_bytes and node.children is not None:
        _fail(tree, "T1", f"only a leaf may end in a partly filled page: {describe(node)}")


def _check_children(tree: RadixTree, node: Node) -> None:
    """T2, T4 and T5 for the children of one node."""
    firsts = sorted(child.key[: tree.page_bytes] for child in node)
    kids = node.children
    if len(firsts) == 1 and kids is not next(iter(node)):
        _fail(tree, "T2", f"an only child lies in a container: {describe(node)}")
    if isinstance(kids, Children) and sorted(kids) != firsts:
        _fail(tree, "T2", f"children are not filed under their first pages: {describe(node)}")
    for child in node:
        if child.parent is not node:
            _fail(tree, "T2", f"the parent of a child is another node: {describe(child)}")
        if node.parent is not None and child.stamp > node.stamp:
            _fail(tree, "T4", f"a child was used after its parent: {describe(child)}, parent: {describe(node)}")
        if node.parent is not None and child.num_holders > node.num_holders:
            _fail(tree, "C2", f"a child has more holders than its parent: {describe(child)}")
    for first, second in pairwise(firsts):
        if second.startswith(first):
            _fail(tree, "T5", f"a child's key is a prefix of its sibling's: {describe(node)}")


def _check_counters(tree: RadixTree, nodes: list[Node], num_pages: int) -> None:
    """T6: the counters, and a queue of exactly the idle nodes by stamp, children before parents."""
    idle_pages = sum(node.num_pages for node in nodes if not node.num_holders)
    if (tree.num_pages, tree.num_idle_pages) != (num_pages, idle_pages):
        counted = f"{tree.num_pages} pages, {tree.num_idle_pages} idle"
        _fail(tree, "T6", f"{counted} are counted, {num_pages} and {idle_pages} are there")
    if tree.idle.keys() != {node for node in nodes if not node.num_holders}:
        _fail(tree, "T6", "the queue does not hold exactly the idle nodes")
    place = {node: index for index, node in enumerate(tree.idle)}
    for before, after in pairwise(tree.idle):
        if before.stamp > after.stamp:
            _fail(tree, "T6", f"the queue is out of order: {describe(before)} before {describe(after)}")
    for node, index in place.items():
        for child in node:
            if place.get(child, len(place)) > index:
                _fail(tree, "T6", f"a node stands before its child in the queue: {describe(node)}")


def path_pages(node: Node | None) -> npt.NDArray[np.int32]:
    """All pages from the root down to the end of `node`, int32."""
    parts: list[bytes] = []
    while node is not None:
        parts.append(node.pages)
        node = node.parent
    return np.frombuffer(b"".join(reversed(parts)), dtype=np.int32)


def path_key(node: Node | None) -> bytes:
    """All tokens from the root down to the end of `node`."""
    parts: list[bytes] = []
    while node is not None:
        parts.append(node.key)
        node = node.parent
    return b"".join(reversed(parts))
