"""What a copy of token slots between pages must be, checked before anything is written.

Plain Python throughout: most copies are of one page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from seqattn.counts import is_int
from seqattn.errors import LengthError, PageError, SharedPageError

if TYPE_CHECKING:
    from seqattn.pages import PageAllocator, PageList

__all__ = ["refuse_copy"]


def refuse_copy(manager: PageAllocator, src_pages: PageList, dst_pages: PageList, num_slots: PageList) -> None:
    """Raises what `PageAllocator.copy_page_slots` raises."""
    if type(src_pages) is type(dst_pages) is type(num_slots) is list and _is_copy(
        manager, src_pages, dst_pages, num_slots
    ):
        return
    src, dst, slots = _as_ints(src_pages), _as_ints(dst_pages), _as_ints(num_slots)
    if not len(src) == len(dst) == len(slots):
        raise LengthError(f"{len(src)} source pages, {len(dst)} destinations and {len(slots)} slot counts differ")
    count_of = manager.ref_count.item
    for page in src + dst:
        if not is_int(page) or not 0 <= page < manager.num_pages or not count_of(page):
            raise PageError(f"page {page!r} is not in use: a copy needs both of its pages allocated")
    for page in dst:
        if count_of(page) > 1:
            raise SharedPageError(page, count_of(page))
    for count in slots:
        if not is_int(count) or not 1 <= count <= manager.page_size:
            raise LengthError(f"{count!r} slots cannot be copied: a page has {manager.page_size}")
    if len(set(dst)) < len(dst) or not set(dst).isdisjoint(src):
        raise PageError(f"destinations {dst} must differ from each other and from the sources {src}")


def _is_copy(manager: PageAllocator, src_pages: list[int], dst_pages: list[int], num_slots: list[int]) -> bool:
    """Whether these make a copy of one page beyond doubt: what is odd gets the closer look, and its message."""
    if not len(src_pages) == len(dst_pages) == len(num_slots) == 1:
        return False
    src, dst, count, end = src_pages[0], dst_pages[0], num_slots[0], manager.num_pages
    if not type(src) is type(dst) is type(count) is int or not 0 <= src < end > dst >= 0 or src == dst:
        return False
    count_of = manager.ref_count.item
    return 1 <= count <= manager.page_size and count_of(src) > 0 and count_of(dst) == 1


def _as_ints(values: PageList) -> list[int]:
    if type(values) is list:
        return values
    return values.tolist() if isinstance(values, np.ndarray) else list(values)
