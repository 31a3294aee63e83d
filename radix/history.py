"""What eviction took: a bounded record, exact as far back as it goes.

One record for each node that lost pages: when, for whom, under what pressure, and the keys of the edges from the node
up to its root. The keys are the very objects that the tree had, so that writing a record copies no token.

    [a b c d|e f g h] ──▶ [i j k l|m n]     lost its last two pages:  keys (ijklmn, abcdefgh), tokens 8 to 14
    [a b c d|e f g h]                       lost its last page:       keys (abcdefgh,), tokens 4 to 8

For every position of a query the newest record that covers it tells when it was last lost: a prefix that was cached
again and lost again has a newer record. The oldest records are dropped first, so what is found is exact, and only what
is not found may have been forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING, TypeAlias

from radix.node import PAGE_ID_BYTES
from radix.tokens import common_bytes

if TYPE_CHECKING:
    from radix.node import Node

__all__ = ["MOST_BYTES", "Cause", "History", "Lost"]

#: at most so many bytes of keys are kept alive
MOST_BYTES = 1 << 25

#: logical time, the call, the sequences that it got pages for, pages wanted, free and idle: plain, as it must be cheap
Cause: TypeAlias = "tuple[int, str, tuple[Hashable, ...], int, int, int]"

#: namespace, keys of the edges from a node up to the root, and their length
Way: TypeAlias = "tuple[Hashable, tuple[bytes, ...], int]"

#: cause, the way to the node that lost pages, first and last byte of what was lost
Record: TypeAlias = "tuple[Cause, Way, int, int]"

#: cause, and first and last byte of a query that it took
Lost: TypeAlias = "tuple[Cause, int, int]"


class History:
    """The last records of what eviction took; knows of the tree only what it is told.

    Args:
        most_records: how many to keep; 0 keeps none.
        most_bytes: how many bytes of keys to keep alive; an edge counts once for each path that it lies on, so this is
            an upper bound.

    Attributes:
        num_bytes: bytes of keys on record, counted like that.
        forgotten_at: logical time of the last record that was dropped for want of room; None if none was.
        cleared_at: logical time at which the whole cache was last cleared; None if it never was.
    """

    __slots__ = (
        "_left",
        "_node",
        "_records",
        "_size",
        "_stamp",
        "_way",
        "cleared_at",
        "forgotten_at",
        "most_bytes",
        "most_records",
        "num_bytes",
    )

    def __init__(self, most_records: int, most_bytes: int = MOST_BYTES) -> None:
        self.most_records = most_records
        self.most_bytes = most_bytes
        self.num_bytes = 0
        self.forgotten_at: int | None = None
        self.cleared_at: int | None = None
        self._records: deque[Record] = deque()
        # The node that was trimmed last, and what it looks like as long as nobody has used it since: it may well be
        # next again, and its way is on record then.
        self._node: Node | None = None
        self._stamp = self._size = self._left = 0
        self._way: Way = (None, (), 0)

    def __len__(self) -> int:
        return len(self._records)

    def note(self, node: Node, num_pages: int, cause: Cause, page_bytes: int) -> None:
        """A node is about to lose its last `num_pages` pages; half a microsecond, and O(nodes above) for the first."""
        size = len(node.key)
        left = (len(node.pages) // PAGE_ID_BYTES - num_pages) * page_bytes
        # Whoever uses a node stamps it, and nobody changes its key who does not use it.
        if node is self._node and node.stamp == self._stamp and size == self._size:
            end = self._left
        else:
            self._way = _way_to(node, size)
            end = self._way[2]
            self.num_bytes += end
            self._node = node
            self._stamp = node.stamp
        self._size = left
        self._left = left = end - size + left
        records = self._records
        records.append((cause, self._way, left, end))
        if len(records) > self.most_records or self.num_bytes > self.most_bytes:
            self._drop()

    def clear(self, tick: int) -> None:
        """Everything cached became void: nothing that was lost before is worth telling."""
        self._records.clear()
        self.num_bytes, self._node, self.forgotten_at, self.cleared_at = 0, None, None, tick

    def losses(self, query: bytes, namespace: Hashable, start: int) -> list[Lost]:
        """Which bytes of `query` from `start` on were cached once, and what took them last; in order.

        Cost: O(records), each a comparison of what it has in common with the query.
        """
        found: list[Lost] = []
        open_: list[tuple[int, int]] = [(start, len(query))]
        seen: Way | None = None
        common = 0
        for cause, way, begin, end in reversed(self._records):
            if not open_:
                break
            if not (way[0] is namespace or way[0] == namespace):  # a NaN equals nothing, but is itself
                continue
            if way is not seen:
                seen, common = way, _common(way[1], query)
            first, last = max(begin, start), min(end, common)
            if first < last:
                found += [(cause, a, b) for a, b in _overlaps(open_, first, last)]
                open_ = _without(open_, first, last)
        return _joined(sorted(found, key=lambda lost: lost[1]))

    def _drop(self) -> None:
        """Forgets the oldest records until the bounds are kept, and what only they keep alive."""
        records = self._records
        while True:
            cause, way, _, _ = records.popleft()
            if not records or records[0][1] is not way:
                self.num_bytes -= way[2]
                if way is self._way:
                    self._node = None
            if len(records) <= self.most_records and self.num_bytes <= self.most_bytes:
                self.forgotten_at = cause[0]
                return


def _way_to(node: Node, size: int) -> Way:
    """The way from a node, whose key has `size` bytes, up to its root."""
    above: Node = node.parent  # type: ignore[assignment]  # never a root
    if above.parent is None:
        return above.namespace, (node.key,), size  # type: ignore[attr-defined]  # a root
    keys = [node.key]
    while above.parent is not None:
        keys.append(above.key)
        size += len(above.key)
        above = above.parent
    return above.namespace, tuple(keys), size


def _common(keys: tuple[bytes, ...], query: bytes) -> int:
    """How many bytes a query has in common with the path that these keys make, in whole tokens."""
    at = 0
    for key in reversed(keys):
        if not query.startswith(key, at):
            return at + common_bytes(key, query, at)
        at += len(key)
    return at


def _overlaps(ranges: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """The parts of `ranges` that lie in [first, last)."""
    cut = [(max(a, first), min(b, last)) for a, b in ranges]
    return [(a, b) for a, b in cut if a < b]


def _without(ranges: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """The parts of `ranges` that lie outside."""
    cut = [part for a, b in ranges for part in ((a, min(b, first)), (max(a, last), b))]
    return [(a, b) for a, b in cut if a < b]


def _joined(found: list[Lost]) -> list[Lost]:
    """Neighbours of one cause as one."""
    joined: list[Lost] = []
    for cause, first, last in found:
        if joined and joined[-1][0] is cause and joined[-1][2] == first:
            joined[-1] = (cause, joined[-1][1], last)
        else:
            joined.append((cause, first, last))
    return joined
