"""The fastest levels of a forest whose runs are alike: what `Device.choose` says, with Python's numbers.

One prefix for all, or prompts of one length with documents of one length: most batches are of this kind. Their few
calls are counted one by one, many times faster than by numpy's functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seqattn.load import FA3, fa3_load, makes_sense, one_fa2_load, slices_for
from seqattn.steps import NUMBERS, body_of, step_us

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from seqattn.device import Device
    from seqattn.groups import RunArrays
    from seqattn.load import Heads

    Int64Array = npt.NDArray[np.int64]
    Body = tuple[float, ...]

__all__ = ["AlikeSteps"]


class AlikeSteps:
    """The steps of a batch whose runs are `all_alike`.

    Args:
        device: the device.
        heads: the model's.
        runs: the forest.
        num_tokens: tokens of the sequence at each position of the order, int64 [batch].
        rows_each: query rows of every sequence.
        page_size: tokens in a page.
    """

    def __init__(
        self, device: Device, heads: Heads, runs: RunArrays, num_tokens: Int64Array, rows_each: int, *, page_size: int
    ) -> None:
        self.device, self.heads = device, heads
        self.num_tokens, self.rows_each = num_tokens, rows_each
        first = [members[0] for members in runs.members]
        self.counts = [len(members) for members in runs.members]
        self.rows, self.sizes = runs.rows[first].tolist(), runs.size[first].tolist()
        self.tokens = (page_size * runs.num_pages[first]).tolist()
        self.slices = slices_for(heads, device.slices).tolist()
        self._levels: dict[tuple[int, int], list[Body]] = {}

    def best(self, choices: Sequence[Sequence[int]]) -> int:
        """Which of these sets of depths to keep, none the first, of at most two depths each.

        Cost: some two microseconds for each way to compute a call, five for two of them together.
        """
        return self.device.choose_by([self.least_us(kept) for kept in choices], [len(kept) for kept in choices])

    def least_us(self, kept: Sequence[int]) -> float:
        """The least time of a step with these depths as levels."""
        last = self._last(kept)
        if not kept:
            return self.device.plain_us + last[0] + last[1]
        top = self._level(0, kept[0])
        if len(kept) == 1:
            return min(float(step_us(self.device, call, None, last, NUMBERS)) for call in top)
        return self._least_of_pairs(top, self._level(kept[0] + 1, kept[1]), last)

    def _least_of_pairs(self, top: list[Body], lower: list[Body], last: Body) -> float:
        """The least time of two shared levels; the pairs that could be short come first.

        No step is shorter than either call, nor than the last one with what the others split, with all that is merged.
        """
        device = self.device
        always = device.start_us + 2 * device.level_us + last[5]
        behind = last[0] + last[1] + device.last_us
        pairs = []
        for i, a in enumerate(top):
            for j, b in enumerate(lower):
                longest = max(a[0] + a[1], b[0] + b[1], behind + a[1] + b[1])
                pairs.append((longest + a[5] + b[5] + device.gather_us * max(a[6], b[6]) + always, i, j))
        least = float("inf")
        for at_least, i, j in sorted(pairs):
            if at_least >= least:
                break
            least = min(least, step_us(device, top[i], lower[j], last, NUMBERS))
        return least

    def _level(self, begin: int, depth: int) -> list[Body]:
        """The calls for a level of all runs of a depth, which read what depths from `begin` on have as well."""
        if (known := self._levels.get((begin, depth))) is not None:
            return known
        tokens, count, rows = sum(self.tokens[begin : depth + 1]), self.counts[depth], self.rows[depth]
        different = sum(self.tokens[d] * self.counts[d] for d in range(begin, depth + 1))
        processors = self.device.num_processors
        calls = [one_fa2_load(self.heads, processors, rows, tokens, different, times=count)]
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
        own = self.num_tokens - sum(self.tokens[:begin])
        again = sum(self.tokens[d] * self.counts[d] * (self.sizes[d] - 1) for d in range(begin, len(self.tokens)))
        different = int(own.sum()) - again
        return self._body(one_fa2_load(self.heads, self.device.num_processors, self.rows_each, own, different))

    def _body(self, call: tuple[int, tuple[float, ...]]) -> Body:
        kernel, load = call
        return body_of(self.device, self.device.columns[kernel], kernel == FA3, load, self.heads, NUMBERS)
