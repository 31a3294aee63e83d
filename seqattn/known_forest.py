"""The forest of a batch that is known already, brought to what the batch is now without comparing all tables again.

Tables only grow at their ends, so two of them that part at a page part there for ever. What may still change a forest
that was built is a limit (`build_forest`: how many pages of a sequence may be shared):

    pages of    0   1   2   3 ...      limit   end of its deepest run
    sequence 0  7   8 │ 5              2       2      open: it may share page 2, 3 ... once its limit grows
    sequence 1  7   8 │ 4   3 │ 9      4       4      open as well
    sequence 2  7   8 │ 4   3   6      5       4      closed: page 4 is no other's, whatever grows

Invariants:

- A sequence is open if its limit is where its deepest run ends, else closed: then no other has the page there.
- The forest of the same tables under other limits is the same as long as no limit falls below the end of the
  sequence's deepest run, and that of an open sequence stays as it is: `least <= limits <= most`. If that of an open one
  has grown, one page of each branch below its deepest run tells whether the forest is another now.

What two sequences have in common, each up to its limit, is the least of what neighbours between them have, since the
order is depth-first. So one number for each two neighbours is the whole forest, and few need be found anew:

    positions          0   1   2   3
    0 and 1 and 2        2   4           the numbers of the picture
    1 leaves             2               the lesser of its two
    7 8 4 3 1 joins      2   4           behind the last of those that it has most in common with, here sequence 2
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import define

from seqattn.forest import Run, add_runs, agreed, build_forest
from seqattn.levels import pages_above
from seqattn.neighbours import stretches

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from seqattn.pages import PageArray

    Int64Array = npt.NDArray[np.int64]

__all__ = ["KnownForest"]

#: one sequence in so many may have joined for the forest not to be built anew, which takes as long as to place more
_JOINED = 16
_NO_LIMIT = np.iinfo(np.int64).max


@define(slots=True, frozen=True, eq=False)
class KnownForest:
    """A forest, and what must hold for it to stay what it is.

    Attributes:
        order: number of the sequence at each position, int64 [batch].
        runs: each behind the one above it.
        least, most: between which each sequence's limit must be, int64 [batch], by its number.
    """

    order: Int64Array
    runs: list[Run]
    least: Int64Array
    most: Int64Array

    @classmethod
    def built(cls, tables: Sequence[PageArray], limits: Int64Array) -> KnownForest:
        """From nothing; arguments and cost as of `build_forest`."""
        order, runs = build_forest(tables, limits.tolist())
        return cls._of(np.array(order, dtype=np.int64), runs, limits)

    @classmethod
    def _of(cls, order: Int64Array, runs: list[Run], limits: Int64Array) -> KnownForest:
        least = np.empty_like(limits)
        least[order] = pages_above(runs, len(order))
        return cls(order, runs, least, _most(limits, least))

    def holds(self, limits: Int64Array) -> bool:
        """Whether it is the forest of its tables, which have only grown at their ends, under these limits."""
        return bool((limits >= self.least).all() and (limits <= self.most).all())

    def under(self, tables: Sequence[PageArray], limits: Int64Array) -> KnownForest | None:
        """The same forest under limits that open sequences have outgrown; None if it is another one under these.

        It stays as it is where each of them goes on with a page that no other below its deepest run goes on with.

        Cost: some ten numpy calls, one for each run, and a page of each sequence and run below those runs.
        """
        if (limits < self.least).any():
            return None
        deepest = np.full(len(self.order), -1, dtype=np.int64)
        for index, run in enumerate(self.runs):  # a run below overwrites what the run above it left
            deepest[run.first : run.stop] = index
        grown = deepest[(limits > self.most)[self.order]]
        for index in set(grown.tolist()):
            end = self.runs[index].end if index >= 0 else 0
            alone = self.order[deepest == index].tolist()
            pages = [tables[i].item(end) for i in alone if limits.item(i) > end]
            heads = [run.first for run in self.runs if run.parent == (index if index >= 0 else None)]
            pages += [tables[i].item(end) for i in self.order[heads].tolist()]
            if len(set(pages)) < len(pages):
                return None
        return KnownForest(self.order, self.runs, self.least, _most(limits, self.least))

    def changed(self, before: Int64Array, tables: Sequence[PageArray], limits: Int64Array) -> KnownForest | None:
        """The forest of a batch that has much of this one's.

        Args:
            before: the number in this batch of each sequence, whose table has only grown at its end since; -1 for one
                that was not in it.
            tables: of the other batch.
            limits: likewise, int64.

        Returns:
            None if it is quicker to build it.

        Cost: some 20 numpy calls; for each sequence that joins a step for each sequence that it might stand beside.
        """
        if not len(self.order) or (len(before) - len(self.order)) * _JOINED > len(before):
            return None
        stays = (before >= 0) & (limits >= self.least[before]) & (limits <= self.most[before])
        joining, staying = np.flatnonzero(~stays), np.flatnonzero(stays)
        if len(joining) * _JOINED > len(before):
            return None
        now = np.full(len(self.order), -1, dtype=np.int64)
        now[before[staying]] = staying
        numbers = now[self.order]
        left = np.flatnonzero(numbers >= 0)
        line = _Line(numbers[left].tolist(), _agreements(self, left), tables, limits.tolist())
        for number in joining.tolist():
            line.add(number)
        runs: list[Run] = []
        add_runs(stretches(line.ends, 0), runs, 0, 0, None)
        return self._of(np.array(line.numbers, dtype=np.int64), runs, limits)


def _most(limits: Int64Array, least: Int64Array) -> Int64Array:
    """Of sequences whose deepest runs end there: up to which limits the forest is known."""
    return np.where(limits == least, least, _NO_LIMIT)


def _agreements(forest: KnownForest, left: Int64Array) -> list[int]:
    """How many pages each two neighbours of those that are left, at these positions, have in common."""
    if len(left) < 2:
        return []
    ends = np.zeros(len(forest.order), dtype=np.int64)
    for run in forest.runs:  # a run below overwrites what the run above it left
        ends[run.first : run.stop - 1] = run.end
    agreements: list[int] = np.minimum.reduceat(ends, left)[:-1].tolist()
    return agreements


class _Line:
    """Sequences in depth-first order, to which others are added.

    Attributes:
        numbers: of the sequences.
        ends: how many pages each two neighbours have in common.
    """

    def __init__(self, numbers: list[int], ends: list[int], tables: Sequence[PageArray], limits: Sequence[int]) -> None:
        self.numbers, self.ends, self._tables, self._limits = numbers, ends, tables, limits
        # Of the branches below a run, which the first of its sequences and its end tell apart: the page that each goes
        # on with, and the first sequence. They stay what they are, since whoever joins stands behind others.
        self._branches: dict[tuple[int, int], dict[int, int]] = {}

    def add(self, number: int) -> None:
        """Puts a sequence behind those that it has most in common with."""
        if not self.numbers:
            self.numbers.append(number)
            return
        stop, end = self._place(number)
        self.numbers.insert(stop, number)
        self.ends.insert(stop - 1, end)

    def _place(self, joining: int) -> tuple[int, int]:
        """Where those end that a sequence has most in common with, and how many pages that is."""
        numbers, ends, table, limit = self.numbers, self.ends, self._tables[joining], self._limits[joining]
        first, stop, depth = 0, len(numbers), 0
        while True:
            # All of [first, stop) have `end` pages in common with each other, and `depth` of them with this one.
            number = numbers[first]
            end = min(ends[first : stop - 1], default=self._limits[number])
            depth = agreed(self._tables[number], table, depth, min(end, limit))
            if depth < end or depth == limit or stop - first == 1:
                return stop, depth
            found = self._below(first, stop, end).setdefault(table.item(end), joining)
            if found == joining:
                return stop, depth
            first = numbers.index(found)
            stop = ends.index(end, first, stop - 1) + 1 if end in ends[first : stop - 1] else stop

    def _below(self, first: int, stop: int, end: int) -> dict[int, int]:
        """The branches of the run that these positions are, and that ends there; of those that go on."""
        found = self._branches.get((self.numbers[first], end))
        if found is None:
            tables, limits = self._tables, self._limits
            heads = [self.numbers[i] for i, e in enumerate([end, *self.ends[first : stop - 1]], first) if e == end]
            found = {tables[head].item(end): head for head in heads if limits[head] > end}
            self._branches[self.numbers[first], end] = found
        return found
