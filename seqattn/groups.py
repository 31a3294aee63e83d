"""What the levels of a batch compute and read, from the forest alone: before anything is packed.

A run that is dropped goes down to the kept runs below it, and is listed once for each of them:

    run 0 [0, 4)  pages 0 1                dropped
      run 1 [0, 2)  page 2                 kept: group 0, pages 0 1 2
      run 2 [2, 4)  page 3                 kept: group 1, pages 0 1 3      6 pages, 4 of them different

Many choices of runs are looked at together: arrays are [choices, runs], and a step down or up the forest is one for all
runs of a depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from seqattn.load import Cut, Groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from seqattn.forest import Run

    Int64Array = npt.NDArray[np.int64]
    BoolArray = npt.NDArray[np.bool_]

__all__ = ["RunArrays", "child_sums", "cut_of", "groups_of"]

Number = TypeVar("Number", np.int64, np.float64)


class RunArrays:
    """A forest's runs as arrays with an entry for each.

    Args:
        runs: each behind the one above it.
        rows_before: query rows before each position of the order, int64 [batch + 1].
    """

    def __init__(self, runs: Sequence[Run], rows_before: Int64Array) -> None:
        *columns, above = zip(*runs, strict=True) if runs else ((),) * 5
        parents = [-1 if parent is None else parent for parent in above]
        depths: list[int] = []
        for parent in parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        # One conversion: each of so few numbers costs more than they do.
        numbers: Int64Array = np.array((*columns, parents, depths), dtype=np.int64)
        #: of each run; `parent` is -1 for none
        self.first, self.stop, begin, self.end, self.parent, self.depth = numbers
        self.num_pages, self.size = self.end - begin, self.stop - self.first
        self.batch = len(rows_before) - 1
        self.has_one_row_each = bool(rows_before[-1] == self.batch)
        self.rows = self.size if self.has_one_row_each else rows_before[self.stop] - rows_before[self.first]
        #: runs of each depth; those of one parent stand side by side, in the order of their parents
        self.members = [(self.depth == depth).nonzero()[0] for depth in range(1 + max(depths, default=-1))]


def cut_of(
    runs: RunArrays, kept: BoolArray, num_tokens: Int64Array, rows: Int64Array, *, page_size: int
) -> tuple[Cut, list[int]]:
    """The groups of every level of every choice, and how many levels above the last each choice has.

    Args:
        runs: the forest.
        kept: for each choice and run whether it is a group of a level, [choices, runs].
        num_tokens: tokens of the sequence at each position of the order, int64 [batch].
        rows: its query rows.
        page_size: tokens in a page.

    Cost: O(choices * (batch + runs)) and a dozen numpy calls for each depth of the forest.
    """
    num_choices, batch = len(kept), len(num_tokens)
    level, above = _levels(runs, kept)
    inside = _inside(runs, kept)
    num_shared = np.where(kept, level + 1, 0).max(axis=1, initial=0)
    begins = num_shared.cumsum() - num_shared
    num_levels = int(num_shared.sum())
    choice, run = kept.nonzero()
    at = begins[choice] + level[choice, run]
    by_level = at.argsort(kind="stable")
    choice, run = choice[by_level], run[by_level]
    pages = runs.end[run] - above[choice, run]
    own = num_tokens - page_size * _shared_pages(runs, (choice, run, pages), (num_choices, batch))
    # The pages of a dropped run are listed by the kept runs below it, and by each sequence that is in none of those.
    # Levels of a choice that has as many levels above are not there: what would be theirs goes to one behind all.
    once = np.where(inside > 0, runs.num_pages, 0)
    places = np.where(level < num_shared[:, None], begins[:, None] + level, num_levels)
    shared = np.bincount(places.ravel(), weights=once.ravel(), minlength=num_levels + 1)[:-1]
    is_own = (inside < runs.size) & ~kept
    alone = int(num_tokens.sum()) - page_size * int(runs.size @ runs.num_pages)
    counts = np.concatenate((np.bincount(at, minlength=num_levels), np.full(num_choices, batch)))
    all_rows = np.concatenate((runs.rows[run], *[rows] * num_choices))
    cut = Cut(
        all_rows,
        np.concatenate((page_size * pages, own.ravel())),
        np.ones_like(all_rows),
        counts.cumsum() - counts,
        np.concatenate((page_size * shared, alone + page_size * (is_own @ runs.num_pages))).astype(np.int64),
        num_levels,
    )
    return cut, num_shared.tolist()


def groups_of(
    runs: Sequence[Run], kept: Sequence[bool], rows_before: Int64Array, num_tokens: Int64Array, *, page_size: int
) -> list[Groups]:
    """The groups of each level if these runs are kept, coarsest first, the last level's included."""
    arrays, mask = RunArrays(runs, rows_before), np.array([kept], dtype=bool).reshape(1, len(runs))
    cut, _ = cut_of(arrays, mask, num_tokens, np.diff(rows_before), page_size=page_size)
    bounds = [*cut.first.tolist(), len(cut.rows)]
    return [
        Groups(cut.rows[bounds[i] : bounds[i + 1]], cut.tokens[bounds[i] : bounds[i + 1]], different)
        for i, different in enumerate(cut.different.tolist())
    ]


def child_sums(
    values: npt.NDArray[Number], parents: Int64Array, *, axis: int = 0
) -> tuple[Int64Array, npt.NDArray[Number]]:
    """The parents of some runs, each once, and the sums of `values` over the runs of each.

    Args:
        values: with an entry for each run along the axis.
        parents: of each run, those of one parent side by side.
        axis: which axis of `values`.
    """
    begins = np.concatenate(([True], parents[1:] != parents[:-1])).nonzero()[0]
    return parents[begins], np.add.reduceat(values, begins, axis=axis)


def _levels(runs: RunArrays, kept: BoolArray) -> tuple[Int64Array, Int64Array]:
    """For each choice and run how many kept runs are above it, and where the pages of the nearest of them end."""
    level, above = (np.zeros(kept.shape, dtype=np.int64) for _ in range(2))
    for members in runs.members[1:]:
        parents = runs.parent[members]
        its = kept[:, parents]
        level[:, members] = level[:, parents] + its
        above[:, members] = np.where(its, runs.end[parents], above[:, parents])
    return level, above


def _inside(runs: RunArrays, kept: BoolArray) -> Int64Array:
    """For each choice and run how many of its sequences are in a kept run: it, or one below it."""
    inside = np.where(kept, runs.size, 0)
    for members in reversed(runs.members[1:]):
        parents = runs.parent[members]
        above, sums = child_sums(inside[:, members], parents, axis=1)
        inside[:, above] = np.where(kept[:, above], runs.size[above], sums)
    return inside


def _shared_pages(runs: RunArrays, groups: tuple[Int64Array, ...], shape: tuple[int, int]) -> Int64Array:
    """Pages of each choice and sequence in kept runs: what each run adds, from its first sequence to its last."""
    choice, run, pages = groups
    num_choices, batch = shape
    places = choice * (batch + 1)
    where = np.concatenate((places + runs.first[run], places + runs.stop[run]))
    steps = np.bincount(where, weights=np.concatenate((pages, -pages)), minlength=num_choices * (batch + 1))
    shared: Int64Array = steps.reshape(num_choices, batch + 1).cumsum(axis=1)[:, :-1].astype(np.int64)
    return shared
