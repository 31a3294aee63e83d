"""The children of a node by the bytes of their first page: a dictionary that can be asked for neighbours.

Most lookups are exact, most misses share not even a first token with any child, and most nodes come and go without
their place among their siblings ever being asked for. So first tokens are counted, the order is made when a neighbour
is first asked for, and a key that goes stays in the order until more have gone than are left: filing a child and
taking it out cost two dictionary operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedList

from radix.tokens import TOKEN_BYTES, common_bytes

if TYPE_CHECKING:
    from radix.node import Node

__all__ = ["Children"]


class Children(dict[bytes, "Node"]):
    """Two children or more; `get` is the exact lookup, `file` and `take_out` keep the order.

    Invariants: `_firsts` counts the first tokens of the keys; the order, once made, holds exactly the keys that are
    filed and those in `_gone`, which are not.
    """

    __slots__ = ("_firsts", "_gone", "_order")

    def __init__(self) -> None:
        super().__init__()
        self._firsts: dict[bytes, int] = {}
        self._order: SortedList[bytes] | None = None
        self._gone: set[bytes] = set()

    def file(self, key: bytes, child: Node) -> None:
        """Files a child under a new key; O(1), O(log children) once there is an order."""
        self[key] = child
        first = key[:TOKEN_BYTES]
        self._firsts[first] = self._firsts.get(first, 0) + 1
        if self._order is None:
            return
        if key in self._gone:
            self._gone.remove(key)
        else:
            self._order.add(key)

    def take_out(self, key: bytes) -> None:
        """Forgets a child; O(1), amortised."""
        del self[key]
        first = key[:TOKEN_BYTES]
        if self._firsts[first] == 1:
            del self._firsts[first]
        else:
            self._firsts[first] -= 1
        if self._order is None:
            return
        self._gone.add(key)
        if len(self._gone) > len(self):
            self._order = None
            self._gone.clear()

    def neighbours(self, page: bytes) -> tuple[Node | None, Node | None]:
        """The children before and after where `page`, which is not filed, would stand, if any shares its first token.

        Cost: O(1) if none does, else O(log children), amortised.
        """
        if page[:TOKEN_BYTES] not in self._firsts:
            return None, None
        order = self._order
        if order is None:
            order = self._order = SortedList(self)
        after = order.bisect_left(page)
        before, end = after - 1, len(order)
        while before >= 0 and order[before] in self._gone:
            before -= 1
        while after < end and order[after] in self._gone:
            after += 1
        return self[order[before]] if before >= 0 else None, self[order[after]] if after < end else None

    def nearest(self, page: bytes) -> tuple[Node | None, int]:
        """Of children of which none begins with `page`: one that shares the most tokens with it.

        In sorted order that child is a neighbour of where `page` would stand: what lies between two keys shares at
        least the prefix that they share. One bisect, two comparisons.

        Returns:
            The child and how many bytes it shares, in whole tokens; None and 0 if none shares a token.
        """
        before, after = self.neighbours(page)
        left = common_bytes(page, before.key) if before is not None else 0
        right = common_bytes(page, after.key) if after is not None else 0
        if left >= right:
            return (before if left else None), left
        return after, right
