"""Pages whose slots remember what they were computed for, in place of keys and values."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from seqattn.pages import PageAllocator

if TYPE_CHECKING:
    from seqattn.pages import PageArray, PageList

Remembered = tuple[Hashable, tuple[int, ...]]


class FakeKV(PageAllocator):
    """A page manager whose memory is a table of prefixes: `slots[page][offset]`.

        write(page 3, offset 1, 'b', (5, 6))    the KV of token 6 after token 5 in namespace 'b'
        slots[3]                                [('b', (5,)), ('b', (5, 6)), None, None]

    The KV of a token depends on everything before it, so a slot is right if it remembers exactly the namespace and the
    tokens up to its own. A page that is handed out anew has forgotten everything.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages, page_size)
        self.slots: list[list[Remembered | None]] = [[None] * page_size for _ in range(num_pages)]
        self.num_copies = 0

    def take_into(self, pages: PageArray) -> None:
        """Hands out pages, blank."""
        super().take_into(pages)
        for page in pages.tolist():
            self.slots[page] = [None] * self.page_size

    def copy_page_slots(self, src_pages: PageList, dst_pages: PageList, num_slots: PageList) -> None:
        """Copies what the slots remember; only to pages that are held alone."""
        src, dst, counts = self.check_copy(src_pages, dst_pages, num_slots)
        assert (self.ref_count[dst] == 1).all(), f"pages {dst.tolist()} are written, but not all are held alone"
        for page, to, count in zip(src.tolist(), dst.tolist(), counts.tolist(), strict=True):
            self.slots[to][:count] = self.slots[page][:count]
        self.num_copies += 1

    def compute(self, pages: Sequence[int], namespace: Hashable, tokens: Sequence[int], start: int, stop: int) -> None:
        """Writes the KV of tokens [start, stop) of a sequence with this page table."""
        remembered = tuple(tokens)
        for position in range(start, stop):
            page = pages[position // self.page_size]
            assert self.ref_count[page] == 1, f"page {page} is written with ref_count {self.ref_count[page]}"
            self.slots[page][position % self.page_size] = (namespace, remembered[: position + 1])

    def assert_right(self, pages: Sequence[int], namespace: Hashable, tokens: Sequence[int], stop: int) -> None:
        """Every one of the first `stop` slots behind this page table holds the right prefix."""
        remembered = tuple(tokens)
        for position in range(stop):
            page, offset = pages[position // self.page_size], position % self.page_size
            found = self.slots[page][offset]
            assert found == (namespace, remembered[: position + 1]), (
                f"slot {offset} of page {page} remembers {found}, not {(namespace, remembered[: position + 1])}"
            )

    def assert_page_right(self, page: int, namespace: Hashable, tokens: Sequence[int]) -> None:
        """The page holds the last tokens of `tokens`, those from its own first on."""
        remembered = tuple(tokens)
        first = (len(remembered) - 1) // self.page_size * self.page_size
        for end in range(first + 1, len(remembered) + 1):
            found = self.slots[page][end - 1 - first]
            assert found == (namespace, remembered[:end]), (
                f"slot {end - 1 - first} of page {page} remembers {found}, not {(namespace, remembered[:end])}"
            )


def ref_counts(manager: PageAllocator) -> dict[int, int]:
    """The pages in use and how often each is referenced."""
    return {page: count for page, count in enumerate(manager.ref_count.tolist()) if count}
