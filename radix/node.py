"""A node of the radix tree, and the container of its children.

A node owns the run of tokens on the edge into it (`key`) and that run's pages. With pages of four tokens:

    root ──[a b c d|e f g h]──▶ node ──[i j k l|m n]──▶ leaf
            page 7  page 2              page 5  page 9 (partly filled: leaves only)

Children are found by the bytes of their first page. A leaf has no container, a single child stands in the slot itself,
and from two children on they lie in a `Children`, which also finds the child that shares the most tokens with a page
that no child has.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from radix.children import Children
from radix.tokens import TOKEN_BYTES

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["PAGE_ID_BYTES", "Node", "Root"]

#: bytes of one page number in `Node.pages`
PAGE_ID_BYTES = 4


class Node:
    """An edge of the tree and the pages of its tokens.

    Attributes:
        key: token ids on the edge as bytes of int32.
        pages: page numbers of those tokens as bytes of int32, `ceil(tokens / page_size)` of them.
        parent: the node above; None for a root.
        children: None, the only child, or `Children` by the bytes of their first page.
        stamp: logical time of the last use.
        num_holders: sequences and pins that hold the pages; all pages of a node have the same holders.
        num_reuses: how often a new sequence shared the pages.
    """

    __slots__ = ("children", "key", "num_holders", "num_reuses", "pages", "parent", "stamp")

    def __init__(self, key: bytes, pages: bytes, parent: Node | None, stamp: int = 0) -> None:
        self.key = key
        self.pages = pages
        self.parent = parent
        self.children: Node | Children | None = None
        self.stamp = stamp
        self.num_holders = 0
        self.num_reuses = 0

    @property
    def num_pages(self) -> int:
        """Pages of this edge."""
        return len(self.pages) // PAGE_ID_BYTES

    @property
    def num_tokens(self) -> int:
        """Tokens of this edge."""
        return len(self.key) // TOKEN_BYTES

    @property
    def page_ids(self) -> npt.NDArray[np.int32]:
        """The page numbers, int32, read-only, without a copy."""
        return np.frombuffer(self.pages, dtype=np.int32)

    def __iter__(self) -> Iterator[Node]:
        """The children, in no order that matters."""
        kids = self.children
        if kids is None:
            return iter(())
        return iter((kids,)) if isinstance(kids, Node) else iter(kids.values())

    def __repr__(self) -> str:
        """Sizes and state, not the tokens: edges are long."""
        state = f"held by {self.num_holders}" if self.num_holders else "idle"
        sizes = f"{self.num_tokens} tokens, {self.num_pages} pages"
        return f"<{type(self).__name__} {sizes}, {state}, used at {self.stamp}>"

    def add(self, child: Node, page_bytes: int) -> None:
        """Files a new child; O(log children)."""
        kids = self.children
        if kids is None:
            self.children = child
            return
        if isinstance(kids, Node):
            only, self.children = kids, Children()
            kids = self.children
            kids.file(only.key[:page_bytes], only)
        kids.file(child.key[:page_bytes], child)

    def remove(self, child: Node, page_bytes: int) -> None:
        """Takes a child out; O(log children). One that is left goes back into the slot."""
        kids = self.children
        if kids is None or isinstance(kids, Node):
            self.children = None
            return
        kids.take_out(child.key[:page_bytes])
        if len(kids) == 1:
            self.children = next(iter(kids.values()))

    def replace(self, other: Node, page_bytes: int) -> None:
        """Puts `other` in the place of the child whose first page is the same; O(1)."""
        kids = self.children
        if kids is None or isinstance(kids, Node):
            self.children = other
        else:
            kids[other.key[:page_bytes]] = other

    def related(self, key: bytes, offset: int, page_bytes: int) -> Node | None:
        """The child that has a prefix in common with `key[offset:]` that is a whole page or all of one of the two.

        At most one child does: no child's key is a prefix of another's. A child that is a prefix of `key` is its
        predecessor in sorted order, one that `key` is a prefix of its successor.
        """
        kids = self.children
        if kids is None or isinstance(kids, Node):
            return kids
        page = key[offset : offset + page_bytes]
        child = kids.get(page)
        if child is not None:
            return child
        before, after = kids.neighbours(page)
        if before is not None and len(before.key) < len(page) and page.startswith(before.key):
            return before
        if after is not None and len(page) < page_bytes and after.key.startswith(page):
            return after
        return None


class Root(Node):
    """The top of one namespace; has no tokens and no pages."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: Hashable) -> None:
        super().__init__(b"", b"", None)
        self.namespace = namespace
