"""Lists of page numbers: int32 arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from seqattn.pages import PageArray

__all__ = ["concatenate", "has_twice", "unique"]


def unique(pages: PageArray) -> PageArray:
    """The same pages in the same order, each once; most lists have no page twice and come back as they are."""
    if len(pages) < 2:
        return pages
    if not has_twice(pages):
        return pages
    _, first = np.unique(pages, return_index=True)
    return pages[np.sort(first)]


def has_twice(pages: PageArray) -> bool:
    """Whether a page is in the list twice; O(n log n)."""
    ordered = np.sort(pages)
    return bool((ordered[1:] == ordered[:-1]).any())


def concatenate(parts: Iterable[PageArray]) -> PageArray:
    """One int32 array of all parts; an empty one for none."""
    parts = list(parts)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
