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
    src, dst, slots = _as_ints(src_pages), _as_ints(dst_pages), _as_ints(num_slots)
    if len(src) == len(dst) == len(slots) == 1 and _is_copy(manager, src[0], dst[0], slots[0]):
        return
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


def _is_copy(manager: PageAllocator, src: int, dst: int, num_slots: int) -> bool:
    """Whether these make a copy of one page beyond doubt: what is odd gets the closer look, and its message."""
    if not type(src) is type(dst) is type(num_slots) is int or not 0 <= src != dst >= 0:
        return False
    if src >= manager.num_pages or dst >= manager.num_pages or not 1 <= num_slots <= manager.page_size:
        return False
    return manager.ref_count.item(src) > 0 and manager.ref_count.item(dst) == 1


def _as_ints(values: PageList) -> list[int]:
    if type(values) is list:
        return values
    return values.tolist() if isinstance(values, np.ndarray) else list(values)
