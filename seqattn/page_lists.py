"""Lists of page numbers: int32 arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.pages import PageArray

__all__ = ["concatenate", "has_twice", "indptr_of", "unique"]


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


def indptr_of(counts: npt.NDArray[np.integer]) -> PageArray:
    """Where each of lists of so many entries begins, back to back, and where the last ends: int32 [lists + 1]."""
    indptr = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=indptr[1:])
    return indptr
