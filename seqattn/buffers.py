"""Memory for packed page tables, used again as soon as nobody looks at it.

A batch of long sequences packs to megabytes a step. Memory of that size comes fresh from the system each time,
and touching it for the first time costs more than the copy.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

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

    def take(self, size: int) -> PageArray:
        """An array of `size` entries, not initialised; O(1) where an unused one is large enough."""
        pool = self._pool
        unused = sys.getrefcount(pool[0])
        for index in range(1, len(pool)):
            if len(pool[index]) >= size and sys.getrefcount(pool[index]) == unused:
                return pool[index][:size]
        buffer = np.empty(size + size // 8, dtype=np.int32)
        self._pool = [pool[0], *pool[1:][1 - _MOST :], buffer]
        return buffer[:size]
