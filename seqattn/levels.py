"""Levels of a hybrid batch, made of runs of shared pages; drawn at the top of `seqattn/hybrid.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from seqattn.packed import HybridLevel
from seqattn.page_lists import concatenate, indptr_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from seqattn.forest import Run
    from seqattn.pages import PageArray

    Int64Array = npt.NDArray[np.int64]

__all__ = ["last_level", "level", "pages_above", "shared_levels", "summed"]


def shared_levels(
    runs: Sequence[Run], tables: list[PageArray], rows_before: Int64Array, page_size: int
) -> list[HybridLevel]:
    """All levels but the last.

    Args:
        runs: each behind the one above it.
        tables: in group order.
        rows_before: query rows before each position, and all of them, int64 [batch + 1].
        page_size: token slots in a page.
    """
    by_level: list[list[Run]] = []
    level_of: list[int] = []
    for run in runs:
        level_of.append(0 if run.parent is None else level_of[run.parent] + 1)
        if level_of[-1] == len(by_level):
            by_level.append([])
        by_level[level_of[-1]].append(run)
    boundaries = {0, len(tables)}
    levels = []
    for members in by_level:
        # Boundaries only ever grow from level to level, so that groups without pages end where groups above them do.
        boundaries.update(run.first for run in members)
        boundaries.update(run.stop for run in members)
        levels.append(_shared_level(members, sorted(boundaries), tables, rows_before, page_size))
    return levels


def _shared_level(
    members: list[Run], boundaries: list[int], tables: list[PageArray], rows_before: Int64Array, page_size: int
) -> HybridLevel:
    at = {run.first: run for run in members}
    groups = [at.get(first) for first in boundaries[:-1]]
    num_pages = np.array([run.end - run.begin if run else 0 for run in groups], dtype=np.int32)
    return level(
        rows_before[boundaries],
        num_pages,
        concatenate(tables[run.first][run.begin : run.end] for run in members),
        np.where(num_pages > 0, page_size, 0),
    )


def last_level(
    runs: Sequence[Run], tables: list[PageArray], rows_before: Int64Array, lens: Int64Array, page_size: int
) -> HybridLevel:
    """What each sequence has besides the pages of the runs; arguments as above, and tokens of each, int64 [batch]."""
    num_shared = pages_above(runs, len(tables))
    own = [table[begin:] for table, begin in zip(tables, num_shared.tolist(), strict=True)]
    num_own = (-(-lens // page_size) - num_shared).astype(np.int32)
    return level(rows_before, num_own, concatenate(own), (lens - 1) % page_size + 1)


def pages_above(runs: Iterable[Run], num_sequences: int) -> Int64Array:
    """How many of its pages the sequence at each position of the order has in these runs, int64 [batch]."""
    num_shared = np.zeros(num_sequences, dtype=np.int64)
    for run in runs:  # a run below overwrites what the run above it left
        num_shared[run.first : run.stop] = run.end
    return num_shared


def summed(rows: Int64Array) -> Int64Array:
    """The sum of all numbers before each place, and of all."""
    before = np.zeros(len(rows) + 1, dtype=np.int64)
    rows.cumsum(out=before[1:])
    return before


def level(qo_indptr: Int64Array, num_pages: npt.NDArray[np.int32], pages: PageArray, last: Int64Array) -> HybridLevel:
    """A level of groups that begin at these rows and have so many pages each, and tokens in their last ones."""
    parts = (qo_indptr.astype(np.int32), indptr_of(num_pages), pages, last.astype(np.int32))
    return HybridLevel.trusted(*(torch.from_numpy(part) for part in parts))
