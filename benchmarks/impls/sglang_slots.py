"""A page allocator with the surface that SGLang's caches call, as cheap as numpy makes it.

SGLang's own needs CUDA for prompts and joins its list of free pages with each `free`: this one makes SGLang look
better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

__all__ = ["Slots"]


class Slots:
    """Token slots in pages; free pages are a stack.

    Args:
        num_pages: pages in all; page 0 is never handed out.
        page_size: slots in a page.
    """

    dcp_world_size = 1
    device = "cpu"

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size, self.size = num_pages, page_size, num_pages * page_size
        self._stack = np.arange(1, num_pages + 1, dtype=np.int64)
        self._top = num_pages
        self._offsets = np.arange(page_size, dtype=np.int64)
        #: nanoseconds spent here, if `clock` tells the time
        self.ns = 0
        self.clock: Callable[[], int] = int
        self.num_query_tokens = self.num_hit_tokens = 0

    def count(self, num_query_tokens: int, num_hit_tokens: int) -> None:
        """Counts hits as the project's own cache does."""
        self.num_query_tokens += num_query_tokens
        self.num_hit_tokens += num_hit_tokens

    def available_size(self) -> int:
        """Free slots."""
        return self._top * self.page_size

    def alloc_tokens(self, num_tokens: int) -> torch.Tensor:
        """Slots for so many tokens, int64, from whole pages."""
        num_pages = -(-num_tokens // self.page_size)
        assert num_pages <= self._top, (num_pages, self._top)
        pages = self._stack[self._top - num_pages : self._top].copy()
        self._top -= num_pages
        return torch.from_numpy((pages[:, None] * self.page_size + self._offsets).ravel()[:num_tokens].copy())

    def free(self, slots: torch.Tensor) -> None:
        """Takes whole pages back; what does not fit came from no pool (`SGLangRust.put`) and is forgotten."""
        begin = self.clock()
        pages = slots.numpy()[:: self.page_size] // self.page_size
        pages = pages[: self.num_pages - self._top]
        self._stack[self._top : self._top + len(pages)] = pages
        self._top += len(pages)
        self.ns += self.clock() - begin

    def free_segment(self, slots: torch.Tensor, *, start_pos: int) -> None:  # noqa: ARG002  SGLang's signature
        """`free`, as SGLang's caches call it."""
        self.free(slots)

    def free_segments(self, segments: Iterable[tuple[torch.Tensor, int]]) -> None:
        """`free` for several."""
        for slots, _ in segments:
            self.free(slots)

    def get_kvcache(self) -> None:
        """There is no KV memory."""
