"""Page numbers and their reference counts; numpy only.

A page is a fixed run of token slots. `PageAllocator` knows page *numbers*; the tensors behind them belong to
`seqattn.cache.PagedKVCacheManager`, which is an allocator with memory.

    stack   [7 6 5 4 | . . . .]     free pages, the next one to hand out last
                     ^ available_pages_count
    ref_count  [2 1 1 1 0 0 0 0]    one entry a page

Invariants (`check()`):

- P1 every page is free xor in use; the free stack holds no page twice.
- P2 `ref_count[p] == 0` if and only if p is free.
- P3 `ref_count[p]` is at least the number of known holders of p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from seqattn.copies import refuse_copy
from seqattn.counts import as_count, positive
from seqattn.errors import InvariantError, NoPageError, PageError
from seqattn.page_lists import unique

if TYPE_CHECKING:
    PageArray: TypeAlias = npt.NDArray[np.int32]
    PageIndex: TypeAlias = npt.NDArray[np.intp]
    PageList: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]

__all__ = ["PageAllocator"]

_INTP = np.dtype(np.intp)
_ONE = np.array(1, dtype=np.int32)  # halves the cost of an addition: numpy need not find a common type for an int


class PageAllocator:
    """Hands out page numbers and counts the references to them.

    Two sets of methods change the counts. `allocate`, `ref`, `unref` and `release_pages` are for callers who hold pages
    by hand: they check everything. `take`, `hold` and `drop` are for owners that keep their own books (a descriptor, a
    prefix cache): they trust that pages are in use and not named twice, and cost a few numpy calls.

    Args:
        num_pages: pages in all, at least 1. A fresh allocator hands out pages 0, 1, 2, … in order.
        page_size: token slots in a page, at least 1.

    Raises:
        BadValueError: a size below 1, or one that is not an integer.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = positive("num_pages", num_pages)
        self.page_size = positive("page_size", page_size)
        self.ref_count: PageArray = np.zeros(self.num_pages, dtype=np.int32)
        # Indexing with anything but intp makes numpy convert first, which costs more than the indexing itself.
        self._stack: npt.NDArray[np.intp] = np.arange(self.num_pages - 1, -1, -1, dtype=np.intp)
        #: number of free pages
        self.available_pages_count = self.num_pages
        #: references held by hand: through `allocate` and `ref`, less `unref` and what a descriptor took over
        self.num_outside_refs = 0
        #: whether `ref` was ever called: only then may a page have a holder that its other holders do not know of
        self.was_referenced_by_hand = False

    @property
    def free_pages(self) -> PageArray:
        """The free pages, int32 [available_pages_count], the next one to hand out first; a read-only copy."""
        view = self._stack[: self.available_pages_count][::-1].astype(np.int32)
        view.flags.writeable = False
        return view

    # -- by hand: checked ---------------------------------------------------------------------------------------------

    def allocate(self, num_pages: int) -> PageArray:
        """Takes free pages, each with one reference that the caller owns.

        Args:
            num_pages: how many; 0 is legal.

        Returns:
            Page numbers, int32 [num_pages], all different.

        Raises:
            NoPageError: fewer pages are free; nothing is taken.
            LengthError: a negative number, or not an integer.

        Cost: O(num_pages), two numpy calls.
        """
        pages = self.take(as_count("num_pages", num_pages))
        self.num_outside_refs += len(pages)
        return pages

    def ref(self, page_indices: PageList) -> None:
        """Adds one reference, owned by the caller, to each page; a page named twice gets two.

        Raises:
            PageError: a page out of range, or a free one; no count changes.
        """
        pages = self.as_pages(page_indices)
        counts = self.ref_count[pages]
        if len(pages) and counts.min() == 0:
            page = int(pages[counts.argmin()])
            raise PageError(f"page {page} is free and cannot be referenced: allocate it first")
        np.add.at(self.ref_count, pages, _ONE)
        self.num_outside_refs += len(pages)
        self.was_referenced_by_hand = True

    def unref(self, page_indices: PageList) -> None:
        """Gives back one reference per entry; pages that nobody holds any more become free.

        Raises:
            PageError: a page out of range, or named more often than it is referenced, or more references than are held
                by hand (those of sequences end with `release`); no count changes.
        """
        pages = self.as_pages(page_indices)
        if len(pages) > self.num_outside_refs:
            self._refuse_too_many(pages)
            self.refuse_more_than_held(pages)
        self.num_outside_refs -= self.release_refs(pages)

    def refuse_more_than_held(self, pages: PageArray) -> None:
        """Raises PageError if fewer references are held by hand than these pages would take."""
        if len(pages) > self.num_outside_refs:
            raise PageError(
                f"references to pages {pages.tolist()} are not the caller's to give: {self.num_outside_refs} are held "
                "by hand (allocate or ref them first; those of sequences end with release, finish or abort)"
            )

    def _refuse_too_many(self, pages: PageArray) -> None:
        """Raises PageError if a page is named more often than it is referenced."""
        named = np.bincount(pages, minlength=self.num_pages)
        over = np.flatnonzero(named > self.ref_count)
        if len(over):
            page = int(over[0])
            raise PageError(
                f"page {page} has {self.ref_count[page]} references but {named[page]} were given back: released twice?"
            )

    def release_pages(self, page_indices: PageList) -> None:
        """The same as `unref`; seqattn 0.0.2 had both names."""
        self.unref(page_indices)

    def release_refs(self, page_indices: PageList) -> int:
        """What `unref` does, for references that were not held by hand; returns how many were given back."""
        pages = self.as_pages(page_indices)
        index = pages.astype(np.intp)
        np.subtract.at(self.ref_count, index, _ONE)
        left = self.ref_count[index]
        least = left.min(initial=1)
        if least < 0:
            np.add.at(self.ref_count, index, _ONE)
            self._refuse_too_many(pages)
        if least == 0:
            self._push(unique(pages[left == 0] if left.any() else pages))
        return len(pages)

    # -- for owners that keep their own books: unchecked --------------------------------------------------------------

    def take(self, num_pages: int) -> PageArray:
        """`allocate` without its argument check; the references belong to an owner with books of its own.

        Raises:
            NoPageError: fewer pages are free; nothing is taken.
        """
        if num_pages > self.available_pages_count:
            raise NoPageError(num_pages, self.available_pages_count)
        pages = np.empty(num_pages, dtype=np.int32)
        self.take_into(pages)
        return pages

    def take_into(self, pages: PageArray) -> None:
        """`take`, writing the page numbers to `pages`, int32; there must be as many free (not checked)."""
        top = self.available_pages_count
        self.available_pages_count = rest = top - len(pages)
        if len(pages) == 1:  # scalars are cheaper than arrays of one
            page = pages[0] = self._stack.item(rest)
            self.ref_count[page] = 1
            return
        taken = self._stack[rest:top][::-1]
        self.ref_count[taken] = 1
        pages[:] = taken

    def hold(self, pages: PageArray) -> PageIndex:
        """Adds a reference to each page (int32, in use, none twice: not checked); returns an index for `unhold`."""
        index = pages.astype(_INTP)
        held = self.ref_count[index]
        self.ref_count[index] = np.add(held, _ONE, held)
        return index

    def unhold(self, index: PageIndex) -> None:
        """`drop` for pages that somebody else holds too, the tree (not checked): none of them becomes free."""
        left = self.ref_count[index]
        self.ref_count[index] = np.subtract(left, _ONE, left)

    def drop(self, pages: PageArray) -> int:
        """Gives back a reference to each of these pages (int32, in use, no page twice: not checked).

        Returns:
            How many pages became free.
        """
        if len(pages) == 1:
            return self.drop_one(pages.item(0))
        index = pages.astype(np.intp)
        left = self.ref_count[index]
        np.subtract(left, _ONE, left)
        self.ref_count[index] = left
        if np.count_nonzero(left) == len(left):
            return 0
        # Last page first, so that dropping what `take` just gave restores the stack exactly.
        freed = index[left == 0][::-1]
        self._push(freed)
        return len(freed)

    def drop_one(self, page: int) -> int:
        """`drop` of one page: scalars are cheaper than arrays of one."""
        self.ref_count[page] = left = self.ref_count.item(page) - 1
        if left:
            return 0
        self._stack[self.available_pages_count] = page
        self.available_pages_count += 1
        return 1

    def _push(self, pages: npt.NDArray[np.integer[Any]]) -> None:
        top = self.available_pages_count
        self.available_pages_count = top + len(pages)
        self._stack[top : self.available_pages_count] = pages

    def copy_page_slots(self, src_pages: PageList, dst_pages: PageList, num_slots: PageList) -> None:
        """Copies the first `num_slots[i]` token slots of page `src_pages[i]` to `dst_pages[i]`, in every layer.

        An allocator has no memory, so here this only checks its arguments: pages in use, slots in [1, page_size], lists
        of one length, no page written twice, none both read and written. What fails, fails before anything is written.

        Raises:
            PageError: a page out of range or free, or written where it is also read or written.
            SharedPageError: a destination that others hold too.
            LengthError: a number of slots that is not in [1, page_size], or lists of different lengths.
        """
        refuse_copy(self, src_pages, dst_pages, num_slots)

    def check_copy(
        self, src_pages: PageList, dst_pages: PageList, num_slots: PageList
    ) -> tuple[PageArray, PageArray, PageArray]:
        """The checked arguments of `copy_page_slots` as int32 arrays."""
        refuse_copy(self, src_pages, dst_pages, num_slots)
        return self.as_pages(src_pages), self.as_pages(dst_pages), np.asarray(num_slots, dtype=np.int32).reshape(-1)

    def as_pages(self, page_indices: PageList) -> PageArray:
        """Page numbers as an int32 array, checked to be integers in [0, num_pages).

        Raises:
            PageError: anything else, with the value.
        """
        try:
            pages: npt.NDArray[Any] = np.asarray(page_indices)
        except (ValueError, OverflowError) as error:
            raise PageError(f"page numbers must be a flat list of integers, not {page_indices!r}: {error}") from None
        if pages.size == 0:
            return np.empty(0, dtype=np.int32)
        if pages.ndim != 1 or pages.dtype.kind not in "iu":
            raise PageError(f"page numbers must be a flat list of integers, not {page_indices!r}")
        low, high = int(pages.min()), int(pages.max())
        if low < 0 or high >= self.num_pages:
            raise PageError(f"page {low if low < 0 else high} is not in [0, {self.num_pages})")
        return pages.astype(np.int32, copy=False)

    def check(self, holders: PageArray | None = None, *, exact: bool = False) -> None:
        """Recomputes P1 to P3 from scratch; O(num_pages).

        Args:
            holders: pages held by known holders, int32, one entry for each reference. None checks P1 and P2 only.
            exact: the known holders are all there are: counts must be equal, not merely large enough.

        Raises:
            InvariantError: naming the invariant that does not hold.
        """
        free = self._stack[: self.available_pages_count]
        in_range = not len(free) or 0 <= free.min() <= free.max() < self.num_pages
        if not in_range or np.bincount(free, minlength=1).max() > 1:
            raise InvariantError("P1", f"the free stack holds a page twice or out of range: {free.tolist()}")
        is_free = np.zeros(self.num_pages, dtype=bool)
        is_free[free] = True
        wrong = np.flatnonzero(is_free != (self.ref_count == 0))
        if len(wrong) or self.ref_count.min() < 0:
            page = int(wrong[0]) if len(wrong) else int(self.ref_count.argmin())
            state = "free" if is_free[page] else "not free"
            raise InvariantError("P2", f"page {page} is {state} with ref_count {self.ref_count[page]}")
        if holders is None:
            return
        known = np.bincount(holders, minlength=self.num_pages)
        if len(known) > self.num_pages:
            raise InvariantError("P3", f"page {len(known) - 1} is held but is not in [0, {self.num_pages})")
        off = np.flatnonzero(self.ref_count != known if exact else self.ref_count < known)
        if len(off):
            page = int(off[0])
            raise InvariantError("P3", f"page {page} has ref_count {self.ref_count[page]} but {known[page]} holders")
