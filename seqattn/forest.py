"""The prefixes that the page tables of a batch have in common, as a forest; numpy only.

A run is a stretch of pages that the same two or more sequences have in common from the first page on. A sequence takes
part with its shareable pages only: what comes after them must stay its own, because new tokens are written there. To a
forest that was found runs of one sequence may be added (`seqattn.long_lists`).

    pages of    0   1   2   3 ...                  order [0 1 2 | 3 4 | 5]
    sequence 0  7   8 │ 5                          run [0, 3) pages [0, 2)      7 8
    sequence 1  7   8 │ 4   3 │ 9                  run [1, 3) pages [2, 4)      4 3, inside the run above it
    sequence 2  7   8 │ 4   3 │ 6                  run [3, 5) pages [0, 1)      2
    sequence 3  2 │ 1
    sequence 4  2 │ 0                              ranges of sequences are positions in `order`
    sequence 5  6

`order` is the depth-first order of the forest, branches in the order of their first sequence: the sequences of a run
are neighbours, and a batch that is grouped already keeps its order.
"""

from __future__ import annotations

from itertools import accumulate, chain, groupby, pairwise, starmap
from operator import ne
from typing import TYPE_CHECKING, Any, NamedTuple

from seqattn.neighbours import grouped_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seqattn.pages import PageArray

    _Branch = tuple[list[int], Sequence[PageArray], Sequence[int], int, int | None]

__all__ = ["Run", "add_runs", "agreed", "build_forest", "depths_of", "without"]

#: so many branches are found at once; fewer if they have branches themselves, else walking them is faster
_MANY = 8


class Run(NamedTuple):
    """Pages that neighbouring sequences of the order have in common; drawn at the top of this file.

    Attributes:
        first, stop: its sequences, as positions in the order.
        begin, end: its pages, as indices in the page table of any of them.
        parent: index of the run above it in the list of runs, or None.
    """

    first: int
    stop: int
    begin: int
    end: int
    parent: int | None


def build_forest(tables: Sequence[PageArray], limits: Sequence[int]) -> tuple[list[int], list[Run]]:
    """The order and the runs of a batch; a run stands behind the run above it.

    Args:
        tables: each sequence's page table, int32, contiguous.
        limits: how many pages of each table may be shared, at most its length.

    Cost: each shareable page is compared about once, an operation on bytes for each sequence and run above it; in a
    batch that is grouped already one or two for each sequence.
    """
    order: list[int] = []
    runs: list[Run] = []
    # Branches still to walk, the next one last: members that agree on their first `depth` pages, and what is theirs.
    todo: list[_Branch] = [(list(range(len(tables))), tables, limits, 0, None)]
    while todo:
        members, its, most, depth, parent = todo.pop()
        if len(members) < 2:
            order += members
            continue
        least = min(most)
        if (end := _common_end(its, depth, least)) > depth:
            runs.append(Run(len(order), len(order) + len(members), depth, end, parent))
            depth, parent = end, len(runs) - 1
        tried = _looks_grouped(its, depth, least)
        if tried and (below := grouped_runs(its, most, depth, least)) is not None:
            add_runs(below, runs, len(order), depth, parent)
            order += members
            continue
        pages = _next_pages(its, most, depth, least)
        branches = len(set(pages))
        if branches == len(members):
            order += members
            continue
        if sum(map(ne, pages, pages[1:])) >= branches:  # pages that are not side by side
            members, sizes = _by_page(members, pages)
            its, most = [tables[i] for i in members], [limits[i] for i in members]
        elif tried or (below := _all_below(its, most, depth, least, pages, branches)) is None:
            sizes = [len(list(same)) for _, same in groupby(pages)]
        else:
            add_runs(below, runs, len(order), depth, parent)
            order += members
            continue
        parts = list(starmap(slice, pairwise(accumulate(sizes, initial=0))))
        todo += [(members[part], its[part], most[part], depth, parent) for part in reversed(parts)]
    return order, runs


def _common_end(tables: Sequence[PageArray], begin: int, end: int) -> int:
    """How far the tables agree, at most to `end`, given that they agree on their first `begin` pages."""
    lead = tables[0]
    # In most batches the first and the last have the least in common: the others are only seen to agree.
    end = agreed(lead, tables[-1], begin, end)
    parts: list[Any] = [table[begin:end] for table in tables[1:-1]] if end > begin else []
    if not all(map(lead[begin:end].tobytes().startswith, parts)):
        for table in tables[1:-1]:
            end = agreed(lead, table, begin, end)
    return end


def _looks_grouped(tables: Sequence[PageArray], depth: int, least: int) -> bool:
    """Whether the first three go on with the same page, and one behind the first of `_MANY` branches with another."""
    if least <= depth or len(tables) < 2 * _MANY:
        return False
    page = tables[0].item(depth)
    return all(table.item(depth) == page for table in tables[1:3]) and tables[len(tables) // _MANY].item(depth) != page


def _all_below(
    tables: Sequence[PageArray], limits: Sequence[int], depth: int, least: int, pages: list[int], branches: int
) -> list[tuple[int, int, int]] | None:
    """What `grouped_runs` finds, where there are many branches, or the first one has branches itself."""
    lead, first = tables[0], pages.count(pages[0])
    if branches >= _MANY or agreed(lead, tables[first - 1], depth, least) < agreed(lead, tables[1], depth, least):
        return grouped_runs(tables, limits, depth, least)
    return None


def agreed(table: PageArray, other: PageArray, begin: int, end: int) -> int:
    """How far two tables agree between these pages."""
    common = (table[begin:end] != other[begin:end]).tobytes().find(1)
    return end if common < 0 else begin + common


def _next_pages(tables: Sequence[PageArray], limits: Sequence[int], end: int, least: int) -> list[int]:
    """Each sequence's page at `end`; page numbers are not negative, so ~i is that of one that may share no more."""
    if least > end:
        return [table.item(end) for table in tables]
    return [table.item(end) if limit > end else ~i for i, (table, limit) in enumerate(zip(tables, limits, strict=True))]


def _by_page(members: list[int], pages: list[int]) -> tuple[list[int], list[int]]:
    """The members, those that go on with the same page side by side, and how many these are each."""
    branches: dict[int, list[int]] = {}
    for i, page in zip(members, pages, strict=True):
        branches.setdefault(page, []).append(i)
    return list(chain.from_iterable(branches.values())), list(map(len, branches.values()))


def add_runs(below: list[tuple[int, int, int]], runs: list[Run], first: int, depth: int, parent: int | None) -> None:
    """Adds what `grouped_runs` found below a run, or below none, of sequences from position `first` on."""
    # The runs around the next one, the innermost last: where the sequences stop, the page where it ends, its index.
    around = [(float("inf"), depth, parent)]
    for begin, end, stop in below:
        while around[-1][0] <= begin:
            around.pop()
        _, above_end, above = around[-1]
        around.append((stop, end, len(runs)))
        runs.append(Run(first + begin, first + stop, above_end, end, above))


def depths_of(runs: Sequence[Run]) -> list[int]:
    """How many runs each run lies in."""
    depths: list[int] = []
    for run in runs:
        depths.append(0 if run.parent is None else depths[run.parent] + 1)
    return depths


def without(runs: Sequence[Run], kept: Sequence[bool]) -> tuple[list[Run], list[int | None]]:
    """The kept runs alone: pages of a run that is dropped go to the kept runs below it.

    Returns:
        The kept runs, each behind the one above it, and for each of `runs` the index among them of the nearest kept run
        at or above it.
    """
    left: list[Run] = []
    nearest: list[int | None] = []
    for run, keep in zip(runs, kept, strict=True):
        above = None if run.parent is None else nearest[run.parent]
        if keep:
            begin = 0 if above is None else left[above].end
            left.append(Run(run.first, run.stop, begin, run.end, above))
            above = len(left) - 1
        nearest.append(above)
    return left, nearest
