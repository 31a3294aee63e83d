"""Which runs of a forest to keep as levels, by the costs of a `CostModel`: dynamic programming from the leaves up.

The cost of a run depends on what is kept above it and on how many levels are left below it, and on nothing else; so
the best choice for each number of levels is found exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.cost import CostModel
    from seqattn.groups import RunArrays

    FloatArray = npt.NDArray[np.float64]
    Int64Array = npt.NDArray[np.int64]

__all__ = ["MOST_DEPTHS", "RunChoice", "RunCosts"]

#: depths of a forest that are kept or dropped as a whole
MOST_DEPTHS = 3


class RunCosts:
    """Arrays with an entry for each run; costs in microseconds a page."""

    def __init__(self, runs: RunArrays, rows_before: Int64Array, page_size: int, model: CostModel) -> None:
        self.runs = runs
        self.end, self.num_pages, self.parent, self.depth = runs.end, runs.num_pages, runs.parent, runs.depth
        first, stop, rows = runs.first, runs.stop, runs.rows
        self.row_counts, self.page_size, self.model = rows, page_size, model
        singles = np.concatenate(([0.0], np.cumsum(page_size * model.again_us(np.diff(rows_before)))))
        #: read by each sequence of the run by itself
        self.alone: FloatArray = singles[stop] - singles[first]
        self.reread = page_size * model.reread_us

    def complete(self) -> None:
        """What only choices of single runs need."""
        page_size, model = self.page_size, self.model
        #: read by all rows of the run at once
        self.first = page_size * model.first_us(self.row_counts)
        self.again = page_size * model.again_us(self.row_counts)
        #: read by each sequence that is in no run below it
        self.leaving = self.alone.copy()
        inner = self.parent >= 0
        np.subtract.at(self.leaving, self.parent[inner], self.alone[inner])
        #: what the first read costs more than the reads after it
        self.extra = page_size * model.memory_us - self.reread

    def most_saved(self) -> float:
        """A bound on what levels can save: every run read once, at the rate of memory."""
        return float(self.num_pages @ (self.alone - self.reread))


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
