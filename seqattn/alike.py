"""The fastest levels of a forest whose runs are alike: what `Device.choose` says, with Python's numbers.

One prefix for all, or prompts of one length with documents of one length: most batches are of this kind. Their few
calls are counted one by one, many times faster than by numpy's functions; and of the ways to compute them only those
that could be the fastest are computed to the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from seqattn.load import FA3, slices_for
from seqattn.one_load import Lists, fa3_load, makes_sense, one_fa2_load
from seqattn.steps import NUMBERS, body_of, step_us

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from seqattn.device import Device
    from seqattn.forest import Run
    from seqattn.load import Heads

    Int64Array = npt.NDArray[np.int64]
    Body = tuple[float, ...]
    #: no step is shorter than this; the calls of the first shared level, of the second or none, and of the last
    Way = tuple[float, Body, Body | None, Body]

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
        self.device, self.heads, self.rows_each = device, heads, rows_each
        self.lists = Lists(len(num_tokens), int(num_tokens.max()), int(num_tokens.sum()), num_tokens)
        self.counts, self.sizes = runs.counts, runs.sizes
        self.tokens = [page_size * pages for pages in runs.pages]
        self.slices = slices_for(heads, device.slices).tolist()
        self._levels: dict[tuple[int, int], list[Body]] = {}
        self._lasts: dict[int, Body] = {}
        self._paces: dict[float, float] = {}

    def best(self, choices: Sequence[Sequence[int]]) -> int:
        """Which of these sets of depths to keep, none the first, of at most two depths each.

        Cost: some two microseconds for each way to compute a call, less than one for each two of them, and three for
        each two that could be the fastest: mostly these are the first.
        """
        device = self.device
        enough = device.enough_us(self.least_us(()))
        factors = [device.harder(len(kept)) for kept in choices]
        ways = [(way[0] * factors[i], i, way) for i, kept in enumerate(choices) if kept for way in self.ways(kept)]
        best, best_us, least = 0, enough, enough * max(factors)
        for at_least, i, way in sorted(ways):
            if at_least >= least:
                break
            us = self._step_us(way)
            if us * factors[i] < least:
                best, best_us, least = i, us, us * factors[i]
        return best if best_us < enough else 0

    def least_us(self, kept: Sequence[int]) -> float:
        """The least time of a step with these depths as levels."""
        if not kept:
            last = self._last(kept)
            return self.device.plain_us + last[0] + last[1]
        return min(map(self._step_us, self.ways(kept)))

    def _step_us(self, way: Way) -> float:
        _, top, lower, last = way
        return float(step_us(self.device, top, lower, last, NUMBERS))

    def ways(self, kept: Sequence[int]) -> Iterable[Way]:
        """All ways to compute these depths as levels."""
        last, top = self._last(kept), self._level(0, kept[0])
        return self._single(top, last) if len(kept) == 1 else self._pairs(top, self._level(kept[0] + 1, kept[1]), last)

    def _single(self, top: list[Body], last: Body) -> Iterator[Way]:
        device = self.device
        always = device.start_us + device.level_us + last[5]
        waits = device.fa2_waits * last[3] * last[2]
        for a in top:
            behind = self._least_beside(last, a[4], a[0]) + last[1] + device.last_us
            longest = max(a[0] + a[1] + (1 - a[6]) * waits, behind + a[1])
            yield longest + a[5] + device.gather_us * a[6] + always, a, None, last

    def _pairs(self, top: list[Body], lower: list[Body], last: Body) -> Iterator[Way]:
        device, halves = self.device, 2 * self.device.num_processors
        always = device.start_us + 2 * device.level_us + last[5]
        waits, posts = last[3] * last[2], last[1] + device.last_us
        for b in lower:
            b_us, b_post, b_filled, b_wave, b_held, b_merge, b_is_fa3 = b[:7]
            before = device.fa2_waits * (waits + b_wave * b_filled)
            for a in top:
                us, post, _, _, held, merge, is_fa3 = a[:7]
                together = min(held + b_held, halves)
                behind = self._least_beside(last, together, (us * held + b_us * b_held) / together)
                longest = max(us + post + (1 - is_fa3) * before, b_us + b_post, behind + posts + post + b_post)
                yield longest + merge + b_merge + device.gather_us * max(is_fa3, b_is_fa3) + always, a, b, last

    def _least_beside(self, call: Body, held: float, until: float) -> float:
        """A call takes no less beside others that hold so many halves of multiprocessors until then.

        What is left to it reads at least at the pace at which so many blocks would if only reading took time.
        """
        if (pace := self._paces.get(held)) is None:
            halves = 2 * self.device.num_processors
            self._paces[held] = pace = (max(halves - held, 1) / halves) ** (1 - self.device.spread)
        return until * (1 - pace) + call[0] if until * pace < call[0] else call[0] / pace

    def _level(self, begin: int, depth: int) -> list[Body]:
        """The calls for a level of all runs of a depth, which read what depths from `begin` on have as well."""
        if (known := self._levels.get((begin, depth))) is not None:
            return known
        tokens, count = sum(self.tokens[begin : depth + 1]), self.counts[depth]
        rows = self.rows_each * self.sizes[depth]
        different = sum(self.tokens[d] * self.counts[d] for d in range(begin, depth + 1))
        lists = Lists(count, tokens, count * tokens)
        calls = [one_fa2_load(self.heads, self.device.num_processors, rows, lists, different)]
        calls += [
            (FA3, fa3_load(self.heads, rows, tokens, different, slices, times=count))
            for slices in self.slices
            if makes_sense(tokens, slices)
        ]
        self._levels[begin, depth] = bodies = [self._body(call) for call in calls]
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
        load = one_fa2_load(self.heads, self.device.num_processors, self.rows_each, own, own.total - again)
        self._lasts[begin] = body = self._body(load)
        return body

    def _body(self, call: tuple[int, tuple[float, ...]]) -> Body:
        kernel, load = call
        return body_of(self.device, self.device.columns[kernel], kernel == FA3, load, self.heads, NUMBERS)
