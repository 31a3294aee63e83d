"""Memory for packed page tables, used again as soon as nobody looks at it.

A batch of long sequences packs to megabytes a step. Memory of that size comes fresh from the system each time,
and touching it for the first time costs more than the copy. What was written is remembered with the memory: the next
step may need to write only what is new.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from seqattn.pages import PageArray

__all__ = ["Buffers"]

_MOST = 3


class Buffers:
    """Hands out int32 arrays; one that nobody refers to any more, as an array or a tensor, is handed out again."""

    def __init__(self) -> None:
        # The first is never handed out: its reference count is what that of an unused one looks like here.
        self._pool: list[PageArray] = [np.empty(0, dtype=np.int32)]
        # What is in them, by the id of the array, what was written last at the end.
        self._contents: dict[int, Any] = {}

    def take(self, size: int) -> PageArray:
        """An array of `size` entries, not initialised; O(1) where an unused one is large enough.

        One whose content is not remembered is preferred; what is remembered of the one that is taken is forgotten.
        """
        pool, found = self._pool, 0
        for index in range(1, len(pool)):
            if len(pool[index]) >= size and self._is_unused(index):
                found = index
                if id(pool[index]) not in self._contents:
                    break
        if not found:
            pool.append(np.empty(size + size // 8, dtype=np.int32))
            for old in pool[1:-_MOST]:
                self._contents.pop(id(old), None)
            pool[1:-_MOST] = []
            found = len(pool) - 1
        self._contents.pop(id(pool[found]), None)
        return pool[found][:size]

    def remember(self, taken: PageArray, content: object) -> None:
        """Notes what has been written to an array that `take` or `reclaim` gave, to all of it or to its beginning."""
        memory = taken if taken.base is None else taken.base
        self._contents[id(memory)] = content

    def reclaim(self, is_wanted: Callable[[Any], bool]) -> tuple[PageArray, Any] | None:
        """An unused array, whole, that still has what was remembered, and what that is; the latest if there are more.

        It is forgotten, so that whoever is interrupted while changing it leaves nothing behind that is not true.
        """
        for key in reversed(self._contents):
            index = next(i for i, memory in enumerate(self._pool) if id(memory) == key)
            if is_wanted(self._contents[key]) and self._is_unused(index):
                return self._pool[index], self._contents.pop(key)
        return None

    def forget(self) -> None:
        """Forgets all contents; the memory stays."""
        self._contents.clear()

    def _is_unused(self, index: int) -> bool:
        return sys.getrefcount(self._pool[index]) == sys.getrefcount(self._pool[0])
