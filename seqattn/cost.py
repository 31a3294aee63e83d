"""When sharing pays: the predicted time of a batch's levels, and the runs worth a level; numpy only.

Reading a prefix once for many sequences saves memory traffic, and costs one more kernel and one more merge for each
level. What a group of query rows spends on each token it reads is the larger of matrix work and reading:

    first   max(rows * flops / flop rate, bytes / memory rate)     the page is read by this group alone
    again   max(rows * flops / flop rate, bytes / reread rate)     another group of the batch has read it too

A page that several groups read comes from memory once, which costs bytes / memory rate - bytes / reread rate, and from
the L2 cache afterwards. Each level above the last adds `level_overhead_us`.

    a prefix of 16000 tokens, 8 sequences of one row each, the defaults of `CostModel`
    plain    8 * 16000 * again(1 row) + 16000 * (975 - 418) ps     53.5 + 8.9 µs
    shared   16000 * first(8 rows, computed as 16)                 15.6 µs, and 25 µs for the level: pays

The cost of a run depends on what is kept above it and on how many levels are left below it, and on nothing else; so the
best choice is found exactly, from the leaves of the forest up.

Kernels are not that simple: work comes in waves, and a level that leaves multiprocessors idle is cheaper in other
slices. A model with a `Device` takes the best choice for each number of levels, by the costs above, and lets the
device's own figures decide between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field

from seqattn.device import Device, Heads, not_negative, positive_rate
from seqattn.forest import Run
from seqattn.groups import groups_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]
    Int64Array = npt.NDArray[np.int64]

__all__ = ["CostModel", "runs_that_pay"]

#: shared levels at most, where a device decides
_MOST_LEVELS = 3


@define(slots=True, frozen=True)
class CostModel:
    """What a step of attention costs on one device for one model.

    The defaults are fitted to attention times of an H200 (bfloat16, 32 query heads, 8 KV heads, head_dim 128, page 16,
    decode): see `tests/seqattn/test_cost.py` for the measured batches and forests, and how near the model comes.

    Attributes:
        kv_bytes_per_token: bytes of one token's keys and values in one layer: 2 * KV heads * head_dim * element size.
        flops_per_row: operations of one query row on one token: 4 * query heads * head_dim.
        heads_per_kv_head: query heads that share a KV head; a kernel computes their rows together, in tiles of 16, 64
            or 128, so that few rows cost as much as a full tile.
        bytes_per_s: rate of reading memory; 4.2e12 is what the fastest kernels reach of the H200's 4.8e12.
        reread_bytes_per_s: rate of reading what another sequence of the same kernel has just read: the slope of plain
            decode over the length of a shared prefix.
        flops_per_s: rate of the matrix work of a shared level: the slope of a shared level over the same.
        level_overhead_us: what one level above the last adds, in microseconds: a launch, its ramp and tail, a merge.
        launch_us: what a step costs before it reads anything, in microseconds.
        device: what decides between numbers of levels; None to decide by the attributes above.
        heads: the model's heads, for the device.

    Raises:
        BadValueError: a number that is negative, not finite, or zero where it divides.
    """

    kv_bytes_per_token: float = field(default=4096.0, validator=positive_rate)
    flops_per_row: float = field(default=16384.0, validator=not_negative)
    heads_per_kv_head: float = field(default=4.0, validator=positive_rate)
    bytes_per_s: float = field(default=4.2e12, validator=positive_rate)
    reread_bytes_per_s: float = field(default=9.8e12, validator=positive_rate)
    flops_per_s: float = field(default=3e14, validator=positive_rate)
    level_overhead_us: float = field(default=25.0, validator=not_negative)
    launch_us: float = field(default=9.0, validator=not_negative)
    device: Device | None = None
    heads: Heads = Heads()  # noqa: RUF009  frozen

    @classmethod
    def for_heads(
        cls,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        element_size: int,
        *,
        device: Device | None = None,
    ) -> CostModel:
        """A model of these sizes (`element_size` in bytes) on a device; None for an H200."""
        device = Device() if device is None else device
        heads = Heads(num_qo_heads, num_kv_heads, head_dim, element_size)
        return cls(
            heads.token_bytes,
            4 * num_qo_heads * head_dim,
            num_qo_heads / num_kv_heads,
            bytes_per_s=device.fa2_64.bytes_per_s,
            reread_bytes_per_s=max(device.decode.reread_bytes_per_s, device.fa2_64.bytes_per_s),
            flops_per_s=4 * 128 * 128 * device.num_processors / max(device.fa3.token_ns, 1e-3) * 1e9,
            level_overhead_us=device.level_us,
            launch_us=device.start_us,
            device=device,
            heads=heads,
        )

    @property
    def memory_us(self) -> float:
        """Microseconds to read one token's keys and values from memory."""
        return self.kv_bytes_per_token / self.bytes_per_s * 1e6

    @property
    def reread_us(self) -> float:
        """Microseconds to read them again."""
        return self.kv_bytes_per_token / self.reread_bytes_per_s * 1e6

    def first_us(self, rows: npt.NDArray[np.integer]) -> FloatArray:
        """Microseconds a token for groups of `rows` rows that read it alone; element-wise."""
        return np.maximum(self._work_us(rows), self.memory_us)

    def again_us(self, rows: npt.NDArray[np.integer]) -> FloatArray:
        """Microseconds a token for groups of `rows` rows that read it after others; element-wise."""
        return np.maximum(self._work_us(rows), self.reread_us)

    def _work_us(self, rows: npt.NDArray[np.integer]) -> FloatArray:
        packed = rows * self.heads_per_kv_head
        tile = np.where(packed <= 16, 16, np.where(packed <= 64, 64, 128))
        computed: FloatArray = np.ceil(packed / tile) * tile / self.heads_per_kv_head
        return computed * (self.flops_per_row / self.flops_per_s * 1e6)


def runs_that_pay(
    runs: Sequence[Run], rows_before: Int64Array, num_tokens: Int64Array, page_size: int, model: CostModel
) -> list[bool]:
    """Which runs to keep as groups of shared levels, so that the predicted time is least; the fewest levels on a tie.

    A page of a run that another sequence holds past its shareable pages counts as that sequence's own: this is the same
    for every choice, but for the few microseconds by which one of them may read it again.

    Args:
        runs: the forest, each run behind the one above it.
        rows_before: query rows before each position of the order, int64 [batch + 1].
        num_tokens: tokens of the sequence at each position of the order, int64 [batch].
        page_size: tokens in a page.
        model: what things cost.

    Cost: a dozen numpy calls for each depth of the forest, and O(runs * depth * levels) numbers.
    """
    costs = _RunCosts(runs, rows_before, page_size, model)
    none = [False] * len(runs)
    if not runs or not (most_saved := costs.most_saved()) > 0:
        return none
    num_levels = 1 + int(costs.depth.max())
    if model.level_overhead_us > 0:
        num_levels = min(num_levels, int(most_saved / model.level_overhead_us))
    if not num_levels:
        return none
    if model.device is None:
        return _Choice(costs, num_levels).best(model.level_overhead_us)
    choices = _Choice(costs, min(num_levels, _MOST_LEVELS)).best_of_each()
    levels = [groups_of(runs, kept, rows_before, num_tokens, page_size=page_size) for kept in (none, *choices)]
    plain, *times = [model.device.step_us(groups, model.heads) for groups in levels]
    least = min(times)
    pays = least < (1 - model.device.margin) * plain - model.device.margin_us
    return choices[times.index(least)] if pays else none


class _RunCosts:
    """Arrays with an entry for each run; costs in microseconds a page."""

    def __init__(self, runs: Sequence[Run], rows_before: Int64Array, page_size: int, model: CostModel) -> None:
        begin, self.end, first, stop = (
            np.array([getattr(run, name) for run in runs], dtype=np.int64) for name in ("begin", "end", "first", "stop")
        )
        self.num_pages = self.end - begin
        self.parent = np.array([-1 if run.parent is None else run.parent for run in runs], dtype=np.int64)
        depths: list[int] = []
        for run in runs:
            depths.append(0 if run.parent is None else depths[run.parent] + 1)
        self.depth = np.array(depths, dtype=np.int64)
        rows = rows_before[stop] - rows_before[first]
        #: read by all rows of the run at once
        self.first, self.again = page_size * model.first_us(rows), page_size * model.again_us(rows)
        singles = np.concatenate(([0.0], np.cumsum(page_size * model.again_us(np.diff(rows_before)))))
        #: read by each sequence of the run by itself
        self.alone: FloatArray = singles[stop] - singles[first]
        #: the same for the sequences that are in no run below it
        self.leaving = self.alone.copy()
        inner = self.parent >= 0
        np.subtract.at(self.leaving, self.parent[inner], self.alone[inner])
        self.reread = page_size * model.reread_us
        #: what the first read costs more than the reads after it
        self.extra = page_size * model.memory_us - self.reread

    def most_saved(self) -> float:
        """A bound on what levels can save: every run read once, at the rate of memory."""
        return float(self.num_pages @ (self.alone - self.reread))


class _Choice:
    """The cheapest runs to keep for every number of levels, from the leaves of the forest up.

    Below a run at depth d the cost depends on which of the d runs above it is the last one kept (or none), and on how
    many levels are left. For each depth, `below[r, k, n]` is the cost of what lies below run r if its k-th candidate
    was kept last, with n levels left: candidate 0 is none, candidate d + 1 the run itself.
    """

    def __init__(self, costs: _RunCosts, num_levels: int) -> None:
        self.costs = costs
        self.num_levels = num_levels
        self.members = [np.flatnonzero(costs.depth == depth) for depth in range(int(costs.depth.max()) + 1)]
        #: index of each run among those of its depth
        self.rank = np.empty(len(costs.depth), dtype=np.int64)
        for members in self.members:
            self.rank[members] = np.arange(len(members))
        #: for each depth where keeping is cheaper, [runs, candidates above them, levels left]
        self.keeps: list[npt.NDArray[np.bool_]] = []

    def best(self, level_overhead_us: float) -> list[bool]:
        """The choice for the best number of levels."""
        by_levels = self._fill() + level_overhead_us * np.arange(self.num_levels + 1)
        return self._kept(int(by_levels.argmin()))

    def best_of_each(self) -> list[list[bool]]:
        """The choice for each number of levels above 0."""
        self._fill()
        return [self._kept(num_levels) for num_levels in range(1, self.num_levels + 1)]

    def _kept(self, levels_left: int) -> list[bool]:
        kept: list[bool] = []
        # For each run: the candidate kept last, itself included, and the levels left below it.
        states: list[tuple[int, int]] = []
        parents, depths, ranks = self.costs.parent.tolist(), self.costs.depth.tolist(), self.rank.tolist()
        for parent, depth, rank in zip(parents, depths, ranks, strict=True):
            last_kept, left = states[parent] if depth else (0, levels_left)
            keep = bool(self.keeps[depth][rank, last_kept, left])
            kept.append(keep)
            states.append((depth + 1, left - 1) if keep else (last_kept, left))
        return kept

    def _fill(self) -> FloatArray:
        """Notes where keeping is cheaper; returns the cost of the whole forest for each number of levels allowed."""
        ends = self._candidate_ends()
        below = np.zeros((len(self.members[-1]), len(self.members) + 1, self.num_levels + 1))
        for depth in range(len(self.members) - 1, -1, -1):
            cost = self._step(depth, ends[depth], below)
            if depth:
                below = np.zeros((len(self.members[depth - 1]), depth + 1, self.num_levels + 1))
                np.add.at(below, self.rank[self.costs.parent[self.members[depth]]], cost)
        self.keeps.reverse()
        whole: FloatArray = cost[:, 0].sum(axis=0)
        return whole

    def _step(self, depth: int, ends: FloatArray, below: FloatArray) -> FloatArray:
        """The cost of the runs of one depth and all below them, for each candidate above them and number of levels."""
        costs, members = self.costs, self.members[depth]
        leaving, again, first = (values[members, None] for values in (costs.leaving, costs.again, costs.first))
        own = costs.num_pages[members, None]
        uncovered = ends[:, -1:] - ends[:, :-1]
        skip = below[:, :-1] + (uncovered * leaving + own * costs.extra)[..., None]
        keep = np.full_like(skip, np.inf)
        # Pages of runs that were dropped above come along, read by others too.
        keep[..., 1:] = ((uncovered - own) * again + own * first)[..., None] + below[:, -1:, :-1]
        self.keeps.append(keep < skip)
        return np.minimum(keep, skip)

    def _candidate_ends(self) -> list[FloatArray]:
        """For each depth the ends of what may be kept last: nothing (0), each run above, the run; [runs, depth + 2]."""
        ends: list[FloatArray] = []
        for depth, members in enumerate(self.members):
            above = ends[-1][self.rank[self.costs.parent[members]]] if depth else np.zeros((len(members), 1))
            ends.append(np.hstack((above, self.costs.end[members, None])))
        return ends
