"""The prefixes that the page tables of a batch have in common, as a forest; numpy only.

A run is a stretch of pages that the same two or more sequences have in common from the first page on. A sequence takes
part with its shareable pages only: what comes after them must stay its own, because new tokens are written there.

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

from typing import TYPE_CHECKING

from attrs import define

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seqattn.pages import PageArray

__all__ = ["Run", "build_forest", "without"]


@define(slots=True, frozen=True)
class Run:
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
        tables: each sequence's page table, int32.
        limits: how many pages of each table may be shared, at most its length.

    Cost: each shareable page is compared about once, an operation on bytes for each sequence and run above it.
    """
    order: list[int] = []
    runs: list[Run] = []
    # Branches still to walk, the next one last: members that agree on their first `depth` pages and on the page after.
    todo: list[tuple[list[int], int, int | None]] = []
    members, depth, parent = list(range(len(tables))), 0, None
    while True:
        # Page numbers are not negative, so ~i is the next page of a sequence that may share no more.
        pages = [tables[i].item(depth) if limits[i] > depth else ~i for i in members]
        different = len(set(pages))
        if different == len(members):
            order += members
        elif different == 1:
            todo.append((members, depth, parent))
        else:
            branches: dict[int, list[int]] = {}
            for i, page in zip(members, pages, strict=True):
                branches.setdefault(page, []).append(i)
            todo.extend((branch, depth, parent) for branch in reversed(branches.values()))
        while todo and len(todo[-1][0]) == 1:
            order += todo.pop()[0]
        if not todo:
            return order, runs
        members, depth, parent = todo.pop()
        end = _common_end(tables, limits, members, depth)
        runs.append(Run(len(order), len(order) + len(members), depth, end, parent))
        depth, parent = end, len(runs) - 1


def _common_end(tables: Sequence[PageArray], limits: Sequence[int], members: list[int], depth: int) -> int:
    """How far the members' tables agree, given that they agree on the first `depth` pages."""
    end = min([limits[i] for i in members])
    lead = tables[members[0]]
    expected = lead[depth:end].tobytes()
    for i in members[1:]:
        # Most members agree all the way: comparing bytes costs half of what finding a difference does.
        if tables[i][depth:end].tobytes() != expected:
            end = depth + int((tables[i][depth:end] != lead[depth:end]).argmax())
            expected = lead[depth:end].tobytes()
    return end


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
