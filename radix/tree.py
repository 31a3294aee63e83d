"""A radix tree over token ids whose edges lie on page boundaries.

What a lookup finds, for pages of four tokens and the query `a b c d e f g h i j x`:

    root ──[a b c d e f g h]──▶ A ──[i j k l m]──▶ B         nodes [A, B], 10 tokens
                                 └──[p q r s]────▶ C          2 full pages, 2 tokens of the third: the tail page

How an edge is split: the existing node keeps the lower half, so that whoever points at it still points at the end of
the same tokens, and its place in the queue; the new node is the upper half.

    parent ──[a b c d e f g h]──▶ node      ⟹      parent ──[a b c d]──▶ upper ──[e f g h]──▶ node

Idle nodes (held by nobody but the tree) stand in a queue by the time they became idle, deepest first, so its front is
always a leaf: whoever holds a node holds those above it, and a node is never used later than those above it.

Invariants (`check()`):

- T1 edges are page-aligned, but for a leaf's last page; `pages` fits `key`.
- T2 `child.parent is node`, and the child is filed under the bytes of its first page.
- T3 no page twice in the tree.
- T4 stamps never increase going down.
- T5 no sibling's key is a prefix of another's.
- T6 counters and the idle queue equal their recomputation.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Literal, Protocol

from attrs import define

from radix.children import Children
from radix.node import PAGE_ID_BYTES, Node, Root
from radix.proof import check_tree
from radix.tokens import TOKEN_BYTES, common_bytes
from seqattn.errors import BadValueError, TokenError

__all__ = ["Inserted", "Kept", "Path", "RadixTree", "pages_of"]

_LONGEST_GROWN = _LONGEST_CUT = 1 << 16
_PAGES = attrgetter("pages")
_NOTHING_KEPT: Mapping[Node, int] = {}


class Kept(Protocol):
    """How many pages of a node, from its beginning, must stay in the tree."""

    def get(self, node: Node, default: Literal[0], /) -> int:
        """That number; `default` for a node that may go."""


@define(slots=True)
class Path:
    """What a lookup found, from the top down; nothing has been changed.

    Attributes:
        nodes: the nodes that the match touches; the last one perhaps only in part.
        pages: page numbers of all of `nodes`, as bytes of int32.
        num_bytes: length of the match in bytes of the key, in whole tokens.
    """

    nodes: list[Node]
    pages: bytes
    num_bytes: int

    @property
    def num_pages(self) -> int:
        """Pages of `nodes`: where the last node ends, counted from the root."""
        return len(self.pages) // PAGE_ID_BYTES


@define(slots=True)
class Inserted:
    """What `RadixTree.insert` did.

    Attributes:
        node: the deepest node of the key's path.
        pages: the tree's page numbers for the key from where the insert began, as bytes; first `num_known` pages that
            the tree had, then pages that were given to it. Shorter by a page if the key's tail added nothing.
        num_known: pages that the tree had already.
        replaced: the partly filled page that a fuller one took the place of, and the node that now has the fuller one.
    """

    node: Node
    pages: bytes
    num_known: int
    replaced: tuple[int, Node] | None = None


class RadixTree:
    """Finds, keeps and orders the runs of pages that hold token prefixes; knows neither memory nor reference counts.

    Args:
        page_size: tokens in a page, at least 1.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.page_bytes = page_size * TOKEN_BYTES
        self.roots: dict[Hashable, Root] = {}
        self.idle: OrderedDict[Node, None] = OrderedDict()
        self.clock = 0
        self.num_pages = 0
        self.num_idle_pages = 0

    # -- reading ------------------------------------------------------------------------------------------------------

    def match(self, key: bytes | memoryview, namespace: Hashable = None, *, limit: int | None = None) -> Path:
        """The longest cached prefix of `key`, to the token; changes nothing.

        Args:
            key: token ids as bytes of int32; of a `memoryview` nothing is copied but a page for each node.
            namespace: whose root to look under.
            limit: match at most this many bytes.

        Raises:
            BadValueError: the namespace is not hashable.

        Cost: one comparison in place of the bytes that match, plus one dictionary lookup for each node.
        """
        try:
            node: Node | None = self.roots.get(namespace)
        except TypeError as error:
            raise BadValueError(f"namespace must be hashable, not {namespace!r}: {error}") from None
        nodes: list[Node] = []
        at, size, page_bytes = 0, len(key), self.page_bytes
        whole = key if isinstance(key, bytes) else None
        while node is not None and at < size:
            child = node.children
            if child is None:
                break
            if isinstance(child, Children):
                page = bytes(key[at : at + page_bytes])
                found = child.get(page)
                if found is None:
                    found, common = child.nearest(page)
                    if found is not None:
                        nodes.append(found)
                        at += common
                    break
                child = found
            edge = child.key
            end = at + len(edge)
            # The second form takes a view of the key for what the first compares in place: no copy either way.
            if whole.startswith(edge, at) if whole is not None else end <= size and edge.startswith(key[at:end]):
                nodes.append(child)
                at, node = end, child
                continue
            common = common_bytes(edge, key, at)
            if common:
                nodes.append(child)
                at += common
            break
        if limit is not None and at > limit:
            at = _shorten(nodes, limit, page_bytes)
        return Path(nodes, nodes[0].pages if len(nodes) == 1 else b"".join(map(_PAGES, nodes)), at)

    def __iter__(self) -> Iterator[Node]:
        """Every node but the roots, parents first."""
        stack: list[Node] = list(self.roots.values())
        while stack:
            for child in stack.pop():
                yield child
                stack.append(child)

    # -- use ----------------------------------------------------------------------------------------------------------

    def cut(self, node: Node, num_pages: int, at: int) -> Node:
        """The node that ends at page `at`, splitting the edge that crosses it.

        Args:
            node: a node at or below the cut.
            num_pages: pages from the root to the end of `node`.
            at: where to cut, in pages from the root; 0 gives the root.

        An idle upper half stands at the recent end of the queue with the stamp of the lower: the caller stamps it next.
        """
        while num_pages > at:
            above = num_pages - len(node.pages) // PAGE_ID_BYTES
            if above < at:
                return self._split(node, at - above)
            num_pages = above
            node = node.parent  # type: ignore[assignment]  # pages are left, so this is not the root
        return node

    def hold(self, node: Node, stop: Node | None = None, *, reuses: int = 0) -> None:
        """Adds a holder to the path from `node` up to `stop` (not included; None: the root), and stamps all of it."""
        self.clock = clock = self.clock + 1
        num_bytes, parent = 0, node.parent
        while parent is not None and node is not stop:
            node.stamp = clock
            node.num_reuses += reuses
            if node.num_holders:
                node.num_holders += 1
            else:
                node.num_holders = 1
                del self.idle[node]
                num_bytes += len(node.pages)
            node = parent
            parent = node.parent
        self.num_idle_pages -= num_bytes // PAGE_ID_BYTES
        if parent is not None:
            self._stamp_from(node)

    def release(self, node: Node, stop: Node | None = None) -> None:
        """Takes a holder from the path from `node` up to `stop` (not included), and stamps all of it: a use.

        What becomes idle goes to the recent end of the queue, deepest node first.
        """
        self.clock = clock = self.clock + 1
        num_bytes, parent = 0, node.parent
        while parent is not None and node is not stop:
            node.stamp = clock
            node.num_holders = left = node.num_holders - 1
            if not left:
                self.idle[node] = None
                num_bytes += len(node.pages)
            node = parent
            parent = node.parent
        self.num_idle_pages += num_bytes // PAGE_ID_BYTES
        if parent is not None:
            self._stamp_from(node)

    def stamp(self, node: Node) -> None:
        """Marks the path from the root down to `node` as used now."""
        self.clock += 1
        self._stamp_from(node)

    def stamp_too(self, node: Node) -> None:
        """Marks one node more as used by the last use, which stamped those above it."""
        node.stamp = self.clock
        if not node.num_holders:
            self.idle.move_to_end(node)

    def _stamp_from(self, node: Node) -> None:
        clock, idle = self.clock, self.idle
        parent = node.parent
        while parent is not None:
            node.stamp = clock
            if not node.num_holders:
                idle.move_to_end(node)
            node = parent
            parent = node.parent

    # -- insert -------------------------------------------------------------------------------------------------------

    def insert(self, key: bytes, pages: bytes, namespace: Hashable = None, *, under: Node | None = None) -> Inserted:
        """Adds what the tree does not have of a key, and stamps the key's whole path.

        Args:
            key: token ids as bytes of int32: all of the prefix, or what follows after `under`. If `under` ends in a
                partly filled page, from the beginning of that page.
            pages: page numbers of these tokens as bytes of int32, but for that partly filled page.
            namespace: whose root it goes under.
            under: a node whose path is known to come before the key; None for the root.

        Raises:
            TokenError: an empty key and no node to put it under.

        Cost: linear in the tokens of `key`.
        """
        if not key and under is None:
            raise TokenError("an empty prefix cannot be inserted: give at least one token")
        self.clock += 1
        node: Node = self._root(namespace) if under is None else under
        at = 0
        if len(node.key) % self.page_bytes and key:
            self._fill_last_page(node, key)
            at = self.page_bytes
        return self._descend(node, key, at, pages)

    def append(self, node: Node, key: bytes, pages: bytes) -> bytes | None:
        """`insert` under a node that only the caller holds: its edge grows in place, if it can.

            node [a b c d] ──▶ leaf [e f]      key  e f g h i      ⟹      node [a b c d e f g h i]

        Without it, a conversation would be a node deeper with each turn or chunk. Whoever holds the node uses all of
        it now, so nothing is evicted sooner or later for it; the caller stamps the path. Edges do not grow beyond
        `_LONGEST_GROWN` bytes, which bounds the cost.

        Returns:
            The pages that left the tree, as bytes of int32: that of a partly filled leaf, or none. None if the edge
            cannot grow; nothing has changed then.
        """
        leaf, gone = node.children, b""
        if node.num_holders != 1 or len(node.key) % self.page_bytes or len(node.key) + len(key) > _LONGEST_GROWN:
            return None
        if leaf is not None:
            if not isinstance(leaf, Node) or leaf.num_holders or len(leaf.pages) != PAGE_ID_BYTES:
                return None
            if not len(leaf.key) < min(self.page_bytes, len(key)) or not key.startswith(leaf.key):
                return None
            gone = leaf.pages
            self._count_pages(leaf, -1)
            del self.idle[leaf]
            node.children = None
        node.key += key
        node.pages += pages
        self.num_pages += len(pages) // PAGE_ID_BYTES
        return gone

    def _descend(self, node: Node, key: bytes, at: int, pages: bytes) -> Inserted:
        """Walks down what the tree knows of `key[at:]` and adds the rest; `pages` begin at byte `at` of the key."""
        page_bytes, size, known = self.page_bytes, len(key), 0
        while at < size:
            child = node.related(key, at, page_bytes)
            if child is None:
                node = self._add_leaf(node, key[at:], pages[known:])
                break
            common = len(child.key) if key.startswith(child.key, at) else common_bytes(child.key, key, at)
            whole, inside = divmod(common, page_bytes)
            ends_here = at + common == size
            if inside and common == len(child.key) and not ends_here:
                return self._extend_leaf(child, key, at, pages, known)
            if whole:
                node = child if common == len(child.key) and not inside else self._split(child, whole)
                pages = pages[:known] + node.pages + pages[known + len(node.pages) :]
                known += len(node.pages)
                at += whole * page_bytes
            if ends_here and inside:
                # The tree has the key's tail already, perhaps as part of more: that page was used now, and no more.
                self._stamp_from(child if child.num_pages == 1 else self._split(child, 1))
                pages = pages[:known]
                break
            if common < len(child.key) and not ends_here:
                node = self._add_leaf(node, key[at:], pages[known:])
                break
        self._stamp_from(node)
        return Inserted(node, pages, known // PAGE_ID_BYTES)

    def _extend_leaf(self, leaf: Node, key: bytes, at: int, pages: bytes, known: int) -> Inserted:
        """`key[at:]` begins with all of a leaf that ends in a partly filled page: the fuller page takes its place.

            leaf [a b c d|e f]   key  a b c d e f g h i   ⟹   leaf [a b c d|e f g h|i]     nobody holds the leaf
                  page 3  4      pages      5       6               page 3  5       6

        If somebody does, the leaf becomes that one page and the rest a leaf of its own: holders hold all of a node.
        """
        old_page = leaf.pages[-PAGE_ID_BYTES:]
        above = leaf.pages[:-PAGE_ID_BYTES]
        pages = pages[:known] + above + pages[known + len(above) :]
        known += len(above)
        new_page = pages[known : known + PAGE_ID_BYTES]
        if leaf.num_holders:
            if above:
                self._split(leaf, len(above) // PAGE_ID_BYTES)
                at += len(above) // PAGE_ID_BYTES * self.page_bytes
            leaf.pages = new_page
            self._rekey(leaf, key[at : at + self.page_bytes])
            at += self.page_bytes
            node = leaf if at >= len(key) else self._add_leaf(leaf, key[at:], pages[known + PAGE_ID_BYTES :])
        else:
            self._count_pages(leaf, (len(pages) - known) // PAGE_ID_BYTES - 1)
            leaf.pages = above + pages[known:]
            self._rekey(leaf, key[at:])
            node = leaf
        self._stamp_from(node)
        return Inserted(node, pages, known // PAGE_ID_BYTES, (int.from_bytes(old_page, sys.byteorder), leaf))

    def _fill_last_page(self, leaf: Node, key: bytes) -> None:
        """The key begins with all the tokens of the partly filled page that `leaf` ends in: so may the leaf's own."""
        whole = (leaf.num_pages - 1) * self.page_bytes
        if whole + len(key) > len(leaf.key):
            self._rekey(leaf, leaf.key[:whole] + key[: self.page_bytes])

    def _rekey(self, node: Node, key: bytes) -> None:
        """Gives a node another key and files it anew if its first page has changed."""
        parent: Node = node.parent  # type: ignore[assignment]  # never a root
        old, new = node.key[: self.page_bytes], key[: self.page_bytes]
        node.key = key
        kids = parent.children
        if isinstance(kids, Children) and old != new:
            kids.take_out(old)
            kids.file(new, node)

    def _add_leaf(self, parent: Node, key: bytes, pages: bytes) -> Node:
        """A new idle leaf at the recent end of the queue."""
        leaf = Node(key, pages, parent, self.clock)
        parent.add(leaf, self.page_bytes)
        self.idle[leaf] = None
        self._count_pages(leaf, leaf.num_pages)
        return leaf

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cuts an edge after `num_pages` of its pages; returns the new upper half, the node keeps the lower."""
        cut, parent = num_pages * self.page_bytes, node.parent
        upper = Node(node.key[:cut], node.pages[: num_pages * PAGE_ID_BYTES], parent, node.stamp)
        upper.num_holders, upper.num_reuses = node.num_holders, node.num_reuses
        upper.children = node
        parent.replace(upper, self.page_bytes)  # type: ignore[union-attr]  # a root has no edge to split
        node.key, node.pages, node.parent = (node.key[cut:], node.pages[num_pages * PAGE_ID_BYTES :], upper)
        if not upper.num_holders:
            self.idle[upper] = None
        return upper

    def _root(self, namespace: Hashable) -> Root:
        root = self.roots.get(namespace)
        if root is None:
            root = self.roots[namespace] = Root(namespace)
        return root

    def _count_pages(self, node: Node, num_pages: int) -> None:
        """Books pages that came to (or, negative, went from) an edge."""
        self.num_pages += num_pages
        if not node.num_holders:
            self.num_idle_pages += num_pages

    # -- trim ---------------------------------------------------------------------------------------------------------

    def victims(self, num_pages: int, kept: Kept = _NOTHING_KEPT) -> list[tuple[Node, int]]:
        """The next `num_pages` pages to trim, least recently used first: nodes and how many pages from their ends.

        Args:
            num_pages: how many pages; fewer come back if there are no more.
            kept: nodes of which the first so many pages stay.

        Changes nothing. Cost: O(nodes that come back), plus those kept.
        """
        found = []
        for node in self.idle:
            if num_pages <= 0:
                break
            count = min(len(node.pages) // PAGE_ID_BYTES - kept.get(node, 0), num_pages)
            if count > 0:
                found.append((node, count))
                num_pages -= count
        return found

    def trim(self, node: Node, count: int) -> None:
        """Takes the last `count` pages of an idle leaf out of the tree; `pages_of` says which.

        Cost: O(pages), amortised, and O(log siblings) if the node goes.
        """
        self.num_pages -= count
        self.num_idle_pages -= count
        if len(node.key) > _LONGEST_CUT:
            self._halve(node, count)
        pages = node.pages
        keep = len(pages) - count * PAGE_ID_BYTES
        if keep:
            node.pages = pages[:keep]
            node.key = node.key[: keep // PAGE_ID_BYTES * self.page_bytes]
            return
        parent: Node = node.parent  # type: ignore[assignment]  # never a root
        del self.idle[node]
        parent.remove(node, self.page_bytes)
        if parent.children is None and isinstance(parent, Root):
            del self.roots[parent.namespace]

    def _halve(self, leaf: Node, count: int) -> None:
        """Splits a long leaf that loses its last `count` pages: else taking it page by page would be quadratic.

        The upper half goes right behind the leaf in the queue, which is where it belongs if the leaf is at the front.
        """
        while len(leaf.key) > _LONGEST_CUT and 2 * count < leaf.num_pages and next(iter(self.idle)) is leaf:
            upper = self._split(leaf, leaf.num_pages // 2)
            self.idle.move_to_end(upper, last=False)
            self.idle.move_to_end(leaf, last=False)

    def clear(self) -> None:
        """Forgets everything, held or not."""
        self.roots.clear()
        self.idle.clear()
        self.num_pages = self.num_idle_pages = 0

    def check(self) -> None:
        """Recomputes T1 to T6 from scratch; O(tree).

        Raises:
            InvariantError: naming the invariant, with the tree drawn.
        """
        check_tree(self)


def pages_of(victims: Iterable[tuple[Node, int]]) -> bytes:
    """Page numbers of victims, as bytes of int32: a leaf's last pages first, then those above it."""
    return b"".join([node.pages[-count * PAGE_ID_BYTES :] for node, count in victims])


def _shorten(nodes: list[Node], limit: int, page_bytes: int) -> int:
    """Drops the nodes that lie past the first `limit` bytes, which end in the path; returns `limit` in whole tokens."""
    limit -= limit % TOKEN_BYTES
    end = sum(len(node.pages) for node in nodes) // PAGE_ID_BYTES * page_bytes
    while nodes:
        end -= len(nodes[-1].pages) // PAGE_ID_BYTES * page_bytes
        if end < limit:
            break
        nodes.pop()
    return limit
