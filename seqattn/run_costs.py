"""Which runs of a forest to keep as levels, by the costs of a `CostModel`: dynamic programming from the leaves up.

The cost of a run depends on what is kept above it and on how many levels are left below it, and on nothing else; so
the best choice for each number of levels is found exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from seqattn.groups import child_sums

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.cost import CostModel
    from seqattn.groups import RunArrays

    BoolArray = npt.NDArray[np.bool_]
    FloatArray = npt.NDArray[np.float64]
    Int64Array = npt.NDArray[np.int64]

__all__ = ["MOST_DEPTHS", "RunChoice", "RunCosts"]

#: depths of a forest that are kept or dropped as a whole
MOST_DEPTHS = 3


class RunCosts:
    """Arrays with an entry for each run; costs in microseconds a page."""

    def __init__(self, runs: RunArrays, rows_before: Int64Array, page_size: int, model: CostModel) -> None:
        self.runs, self.page_size, self.model = runs, page_size, model
        self.reread = page_size * model.reread_us
        #: read by each sequence of the run by itself
        self.alone: FloatArray
        if runs.has_one_row_each:
            self.alone = runs.size * (page_size * model.again_us(np.ones(1, dtype=np.int64)))
        else:
            before = np.zeros(len(rows_before))
            np.cumsum(page_size * model.again_us(np.diff(rows_before)), out=before[1:])
            self.alone = before[runs.stop] - before[runs.first]

    def complete(self) -> None:
        """What only choices of single runs need."""
        page_size, model, runs = self.page_size, self.model, self.runs
        work = model.work_us(runs.rows)
        #: read by all rows of the run at once
        self.first = page_size * np.maximum(work, model.memory_us)
        self.again = page_size * np.maximum(work, model.reread_us)
        #: read by each sequence that is in no run below it
        self.leaving = self.alone.copy()
        for members in runs.members[1:]:
            above, below = child_sums(self.alone[members], runs.parent[members])
            self.leaving[above] -= below
        #: what the first read costs more than the reads after it
        self.extra = page_size * model.memory_us - self.reread

    def most_saved(self) -> float:
        """A bound on what levels can save: every run read once, at the rate of memory."""
        return float(self.runs.num_pages @ (self.alone - self.reread))


class RunChoice:
    """The cheapest runs to keep for every number of levels, from the leaves of the forest up.

    Below a run at depth d the cost depends on which of the d runs above it is the last one kept (or none), and on how
    many levels are left. For each depth, `below[r, k, n]` is the cost of what lies below run r if its k-th candidate
    was kept last, with n levels left: candidate 0 is none, candidate d + 1 the run itself.
    """

    def __init__(self, costs: RunCosts, num_levels: int) -> None:
        costs.complete()
        self.costs = costs
        self.num_levels = num_levels
        self.runs = costs.runs
        self.members = costs.runs.members
        #: index of each run among those of its depth
        self.rank = np.empty(len(costs.runs.depth), dtype=np.int64)
        for members in self.members:
            self.rank[members] = np.arange(len(members))
        #: for each depth where keeping is cheaper, [runs, candidates above them, levels left]
        self.keeps: list[BoolArray] = []

    def best(self, level_overhead_us: float) -> list[bool]:
        """The choice for the best number of levels."""
        by_levels = self._fill() + level_overhead_us * np.arange(self.num_levels + 1)
        kept: list[bool] = self._kept(np.array([by_levels.argmin()]))[0].tolist()
        return kept

    def best_of_each(self) -> BoolArray:
        """The choice for each number of levels above 0, [levels, runs]."""
        self._fill()
        return self._kept(np.arange(1, self.num_levels + 1))

    def _kept(self, levels_left: Int64Array) -> BoolArray:
        """The choice for each of these numbers of levels, [numbers, runs]."""
        kept = np.empty((len(levels_left), len(self.rank)), dtype=bool)
        # For each choice and run of a depth: the candidate kept last, itself included, and the levels left below it.
        last = np.zeros((len(levels_left), len(self.members[0])), dtype=np.int64)
        left = np.repeat(levels_left[:, None], len(self.members[0]), axis=1)
        for depth, (members, keeps) in enumerate(zip(self.members, self.keeps, strict=True)):
            ranks = np.arange(len(members))
            if depth:
                above = self.rank[self.runs.parent[members]]
                last, left = last[:, above], left[:, above]
            keep = kept[:, members] = keeps[ranks, last, left]
            last, left = np.where(keep, depth + 1, last), left - keep
        return kept

    def _fill(self) -> FloatArray:
        """Notes where keeping is cheaper; returns the cost of the whole forest for each number of levels allowed."""
        ends = self._candidate_ends()
        below = np.zeros((len(self.members[-1]), len(self.members) + 1, self.num_levels + 1))
        for depth in range(len(self.members) - 1, -1, -1):
            cost = self._step(depth, ends[depth], below)
            if depth:
                below = np.zeros((len(self.members[depth - 1]), depth + 1, self.num_levels + 1))
                above, sums = child_sums(cost, self.runs.parent[self.members[depth]])
                below[self.rank[above]] = sums
        self.keeps.reverse()
        whole: FloatArray = cost[:, 0].sum(axis=0)
        return whole

    def _step(self, depth: int, ends: FloatArray, below: FloatArray) -> FloatArray:
        """The cost of the runs of one depth and all below them, for each candidate above them and number of levels."""
        costs, members = self.costs, self.members[depth]
        leaving, again, first = costs.leaving[members, None], costs.again[members, None], costs.first[members, None]
        own = self.runs.num_pages[members, None]
        uncovered = ends[:, -1:] - ends[:, :-1]
        skip = below[:, :-1] + (uncovered * leaving + own * costs.extra)[..., None]
        keep = np.full_like(skip, np.inf)
        # Pages of runs that were dropped above come along, read by others too.
        keep[..., 1:] = ((uncovered - own) * again + own * first)[..., None] + below[:, -1:, :-1]
        self.keeps.append(keep < skip)
        cost: FloatArray = np.minimum(keep, skip)
        return cost

    def _candidate_ends(self) -> list[FloatArray]:
        """For each depth the ends of what may be kept last: nothing (0), each run above, the run; [runs, depth + 2]."""
        ends: list[FloatArray] = []
        for depth, members in enumerate(self.members):
            its = np.zeros((len(members), depth + 2))
            if depth:
                its[:, :-1] = ends[-1][self.rank[self.runs.parent[members]]]
            its[:, -1] = self.runs.end[members]
            ends.append(its)
        return ends
