"""The page table of one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from seqattn.counts import is_int
from seqattn.errors import LengthError, PageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.pages import PageArray, PageList

__all__ = ["SequenceData"]

_MIN_CAPACITY = 8
_LAST_PAGE = 2**31 - 1


class SequenceData:
    """A sequence's page table and how full its last page is.

        page_size 4, 10 tokens:   pages [7 2 5]   last_page_len 2
                                         └┬┘└┬┘└┬
                                   0..3  4..7  8..9

    The table is an int32 buffer that grows by doubling, so that packing it is one copy. It holds page numbers only: the
    references belong to the descriptor that the sequence is in.

    Whoever remembers something of the table's entries puts an object into `mark` and keeps it too: as long as it is
    still there, pages have been appended at most. `write` and `cut` take it out, and nothing else may change entries.

    Args:
        kv_page_indices: page numbers, first page first; copied.
        last_page_len: tokens in the last page, at least 1; 0 if there is no page.

    Raises:
        PageError: the page numbers are not a flat list of integers in [0, 2**31).
        LengthError: `last_page_len` is not an integer, or does not fit the number of pages.
    """

    __slots__ = ("_buffer", "last_page_len", "mark", "num_pages", "table")

    def __init__(self, kv_page_indices: PageList, last_page_len: int) -> None:
        table = _as_table(kv_page_indices)
        num_pages = len(table)
        if not is_int(last_page_len) or last_page_len < 0 or (last_page_len > 0) != (num_pages > 0):
            wanted = "an integer of at least 1" if num_pages else "0"
            raise LengthError(f"last_page_len {last_page_len!r} does not fit {num_pages} pages: it must be {wanted}")
        #: room for the table to grow into: its first `num_pages` entries are in use
        self._buffer = table
        self.num_pages = num_pages
        self.last_page_len = int(last_page_len)
        #: the entries in use, to be read; `write` changes them
        self.table = table
        self.mark: object = None

    @property
    def last_page(self) -> int:
        """The last page number; there must be one."""
        page: int = self._buffer.item(self.num_pages - 1)
        return page

    @property
    def kv_page_indices(self) -> list[int]:
        """The page numbers as a list, made anew on each access: O(pages). `pages` costs O(1)."""
        pages: list[int] = self.table.tolist()
        return pages

    @property
    def pages(self) -> PageArray:
        """The page numbers, int32 [num_pages]: a read-only view, valid until the sequence grows or shrinks."""
        view = self.table[:]
        view.flags.writeable = False
        return view

    def append(self, pages: PageArray) -> None:
        """Adds pages at the end; amortised O(len(pages))."""
        self.room(len(pages))[:] = pages
        self.lengthen(len(pages))

    def room(self, num_pages: int) -> PageArray:
        """The next so many entries after the table's end, to be written before `lengthen`; amortised O(num_pages)."""
        start, stop = self.num_pages, self.num_pages + num_pages
        if stop > len(self._buffer):
            grown = np.empty(max(_MIN_CAPACITY, stop + stop // 2), dtype=np.int32)
            grown[:start] = self.table
            self.table, self._buffer = grown[:start], grown
        return self._buffer[start:stop]

    def lengthen(self, num_pages: int) -> None:
        """Takes that room into the table; O(1)."""
        self.num_pages += num_pages
        self.table = self._buffer[: self.num_pages]

    def write(self, first: int, pages: PageArray) -> None:
        """Puts pages in the place of those from number `first` on; the references are the caller's to settle."""
        self.mark = None
        self.table[first : first + len(pages)] = pages

    def write_last(self, page: int) -> None:
        """Puts a page in the place of the last one; likewise."""
        self.mark = None
        self.table[-1] = page

    def cut(self, num_pages: int) -> None:
        """Keeps the first `num_pages` pages; O(1)."""
        self.mark = None
        self.num_pages = num_pages
        self.table = self._buffer[:num_pages]

    def num_tokens(self, page_size: int) -> int:
        """Tokens in all pages together."""
        return (self.num_pages - 1) * page_size + self.last_page_len if self.num_pages else 0

    def __eq__(self, other: object) -> bool:
        """Equal tables and equal lengths."""
        if not isinstance(other, SequenceData):
            return NotImplemented
        return self.last_page_len == other.last_page_len and np.array_equal(self.table, other.table)

    __hash__ = None  # type: ignore[assignment]  # mutable, like the attrs class of 0.0.2

    def __repr__(self) -> str:
        """In the form of its constructor."""
        return f"SequenceData(kv_page_indices={self.kv_page_indices}, last_page_len={self.last_page_len})"


def _as_table(page_indices: PageList) -> PageArray:
    """Page numbers as a new int32 array; raises PageError."""
    try:
        table: npt.NDArray[Any] = np.asarray(page_indices)
    except (ValueError, OverflowError, TypeError, RuntimeError) as error:  # the last two: some tensors
        raise PageError(f"page numbers must be a flat list of integers, not {page_indices!r}: {error}") from None
    if table.ndim != 1 or (table.size and table.dtype.kind not in "iu"):
        raise PageError(f"page numbers must be a flat list of integers, not {page_indices!r}")
    if table.size and (table.min() < 0 or (table.dtype != np.int32 and table.max() > _LAST_PAGE)):
        page = next(page for page in table.tolist() if not 0 <= page <= _LAST_PAGE)
        raise PageError(f"page {page} is not in [0, 2**31): page numbers are kept as int32")
    return table.astype(np.int32)
