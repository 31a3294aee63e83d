"""Memory for packed page tables, used again as soon as nobody looks at it.

A batch of long sequences packs to megabytes a step. Memory of that size comes fresh from the system each time,
and touching it for the first time costs more than the copy. What was written last is remembered with the memory: the
next step may need to write only what is new.
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
        self._contents: list[object] = [None]

    def take(self, size: int, content: object = None) -> PageArray:
        """An array of `size` entries, not initialised; O(1) where an unused one is large enough.

        Args:
            size: entries.
            content: what the caller is about to write, for `holding`.
        """
        pool = self._pool
        for index in range(1, len(pool)):
            if len(pool[index]) >= size and self._is_unused(index):
                self._contents[index] = content
                return pool[index][:size]
        buffer = np.empty(size + size // 8, dtype=np.int32)
        self._pool = [pool[0], *pool[1:][1 - _MOST :], buffer]
        self._contents = [None, *self._contents[1:][1 - _MOST :], content]
        return buffer[:size]

    def holding(self, is_wanted: Callable[[Any], bool]) -> tuple[PageArray, Any] | None:
        """An unused array, whole, that still has what somebody wrote who told `take`, and what that is; None for none.

        Whoever writes to it keeps the content, which is the same object, true to it.
        """
        for index in range(len(self._pool) - 1, 0, -1):
            content = self._contents[index]
            if content is not None and is_wanted(content) and self._is_unused(index):
                return self._pool[index], content
        return None

    def _is_unused(self, index: int) -> bool:
        return sys.getrefcount(self._pool[index]) == sys.getrefcount(self._pool[0])
