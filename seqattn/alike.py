"""The fastest levels of a forest whose runs are alike: what `Device.choose` says, with Python's numbers.

One prefix for all, or prompts of one length with documents of one length: most batches are of this kind. Their few
calls are counted one by one, many times faster than by numpy's functions; and of the ways to compute them only those
that could be the fastest are computed to the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from seqattn.one_load import Lists
from seqattn.ways import Step, Ways

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from seqattn.device import Device
    from seqattn.forest import Run
    from seqattn.load import Heads
    from seqattn.ways import Body

    Int64Array = npt.NDArray[np.int64]

__all__ = ["AlikeRuns", "AlikeSteps"]


class AlikeRuns(NamedTuple):
    """A forest each depth of which has runs of as many pages and sequences, and all the sequences.

    Attributes:
        depths: of each run.
        counts: runs of each depth.
        sizes: sequences of each run of it.
        pages: pages of each run of it.
    """

    depths: list[int]
    counts: list[int]
    sizes: list[int]
    pages: list[int]

    @classmethod
    def of(cls, runs: Sequence[Run], batch: int, most_depths: int) -> AlikeRuns | None:
        """The runs of so many sequences; None if they are not alike, or of more depths."""
        depths: list[int] = []
        kinds: set[tuple[int, int, int]] = set()
        for first, stop, begin, end, parent in runs:
            depths.append(0 if parent is None else depths[parent] + 1)
            kinds.add((depths[-1], stop - first, end - begin))
            if len(kinds) > most_depths:
                return None
        number, sizes, pages = (list(column) for column in zip(*sorted(kinds), strict=True))
        counts = [depths.count(depth) for depth in number]
        is_whole = all(count * size == batch for count, size in zip(counts, sizes, strict=True))
        return cls(depths, counts, sizes, pages) if is_whole and number == list(range(len(number))) else None


class AlikeSteps:
    """The steps of a batch whose runs are alike.

    Args:
        device: the device.
        heads: the model's.
        runs: the forest.
        num_tokens: tokens of the sequence at each position of the order, int64 [batch].
        rows_each: query rows of every sequence.
        page_size: tokens in a page.
    """

    def __init__(
        self, device: Device, heads: Heads, runs: AlikeRuns, num_tokens: Int64Array, rows_each: int, *, page_size: int
    ) -> None:
        self.by, self.rows_each = Ways(device, heads), rows_each
        self.lists = Lists(len(num_tokens), int(num_tokens.max()), int(num_tokens.sum()), num_tokens)
        self.counts, self.sizes = runs.counts, runs.sizes
        self.tokens = [page_size * pages for pages in runs.pages]
        self._levels: dict[tuple[int, int], list[Body]] = {}
        self._lasts: dict[int, Body] = {}

    def best(self, choices: Sequence[Sequence[int]]) -> int:
        """Which of these sets of depths to keep, none the first, of at most two depths each.

        Cost: some two microseconds for each way to compute a call, and what `Ways.choose` costs.
        """
        return self.by.choose([self.step(kept) for kept in choices])

    def step(self, kept: Sequence[int]) -> Step:
        """The step with these depths as levels."""
        begins = 0, *(depth + 1 for depth in kept)
        return Step([self._level(begin, depth) for begin, depth in zip(begins, kept, strict=False)], self._last(kept))

    def _level(self, begin: int, depth: int) -> list[Body]:
        """The calls for a level of all runs of a depth, which read what depths from `begin` on have as well."""
        if (known := self._levels.get((begin, depth))) is not None:
            return known
        tokens, count = sum(self.tokens[begin : depth + 1]), self.counts[depth]
        rows = self.rows_each * self.sizes[depth]
        different = sum(self.tokens[d] * self.counts[d] for d in range(begin, depth + 1))
        _, bodies = self.by.shared(rows, Lists(count, tokens, count * tokens), different)
        self._levels[begin, depth] = bodies
        return bodies

    def _last(self, kept: Sequence[int]) -> Body:
        """The call for what is left to each sequence."""
        begin = kept[-1] + 1 if kept else 0
        if (known := self._lasts.get(begin)) is not None:
            return known
        count, longest, total, tokens = self.lists
        shared = sum(self.tokens[:begin])
        again = sum(self.tokens[d] * self.counts[d] * (self.sizes[d] - 1) for d in range(begin, len(self.tokens)))
        each = None if tokens is None or count * longest == total else tokens - shared
        own = Lists(count, longest - shared, total - count * shared, each)
        self._lasts[begin] = body = self.by.fa2(self.rows_each, own, own.total - again)
        return body
