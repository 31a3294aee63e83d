"""Which kernel computes a level, and in how many slices; numpy only.

fa3 computes tiles of 128 rows, one after the other on each multiprocessor, and one tile reads one list of pages. A
level with few tiles leaves multiprocessors idle, so its lists are sliced until the tiles fill them:

    132 multiprocessors, 8 KV heads, 64 sequences with 4 query heads for each KV head, one shared prefix
    tiles    2 of 128 rows for each KV head: 16
    slices   8: 128 tiles, each over an eighth of the prefix

What is fastest is predicted by `seqattn.device`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from seqattn.attention.calls import Choice
from seqattn.device import Groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from seqattn.attention.plan import BatchPlan, LevelPlan
    from seqattn.pages import PageArray

__all__ = ["choose", "own_of", "what_matters"]

#: mean rows of a group from which on the causal level is faster in tiles of 128 rows: between 24 and 110 on an H200
_LONG_ROWS = 80
#: what sequences have of their own, in the mean or at most, may differ by so much: a choice stays the same until then
_TOKENS_ALIKE = 32


def choose(
    plan: BatchPlan,
    slices_of: Callable[[Sequence[Groups], Groups], list[int]],
    page_size: int,
    *,
    has_fa3: bool,
    has_spans: bool = False,
) -> list[Choice]:
    """A choice for each level of a batch.

    Args:
        plan: the batch.
        slices_of: gives the slices of shared levels above a last, 0 for fa2.
        page_size: token slots in a page.
        has_fa3: whether the device runs fa3.
        has_spans: as for `work_of`.
    """
    groups = [_groups(level, page_size, has_spans=has_spans) for level in plan.levels[:-1]]
    used = [level for level in groups if len(level.rows)]
    last = plan.levels[-1]
    slices = iter(_slices(used, last, slices_of) if used else ())
    by_level = [next(slices) if len(level.rows) else 0 for level in groups]
    shared = [Choice("fa3", n) if n else _unsliced(level) for level, n in zip(groups, by_level, strict=True)]
    if last.decodes:
        return [*shared, Choice("decode")]
    rows = last.row_lens
    if len(rows) and rows.min() == rows.max() == 1:
        return [*shared, Choice("decode")]
    is_long = has_fa3 and int(rows.sum()) >= _LONG_ROWS * len(rows)
    return [*shared, Choice("fa3" if is_long else "fa2")]


def _unsliced(level: Groups) -> Choice:
    """Long lists have a row each, which the decode kernel reads as fa2 does, and plans faster."""
    return Choice("decode" if level.rows.max(initial=0) == 1 else "fa2")


def _slices(
    shared: Sequence[Groups], last: LevelPlan, slices_of: Callable[[Sequence[Groups], Groups], list[int]]
) -> list[int]:
    """The slices of shared levels that have something to read; fa2 for all where the last has nothing."""
    rows, kv_lens = last.row_lens, last.kv_lens
    if not last.decodes:
        read = (rows > 0) & (kv_lens > 0)
        rows, kv_lens = rows[read], kv_lens[read]
    return slices_of(shared, Groups(rows, kv_lens, int(kv_lens.sum()))) if len(rows) else [0] * len(shared)


def own_of(plan: BatchPlan, page_size: int) -> tuple[int, int]:
    """What sequences have of their own, in the mean and at most, in steps of what is alike."""
    indptr = plan.levels[-1].kv_page_indptr
    most = int((indptr[1:] - indptr[:-1]).max()) if len(indptr) > 1 else 0
    return int(indptr[-1]) * page_size // (_TOKENS_ALIKE * max(plan.num_rows, 1)), most * page_size // _TOKENS_ALIKE


def what_matters(shared: Sequence[Groups], last: Groups) -> bytes:
    """The same for batches for which the same slices are best: where it is, nothing need be predicted again."""
    mean, most = int(last.tokens.sum()) // len(last.rows), int(last.tokens.max())
    about = (len(last.rows), int(last.rows.sum()), mean // _TOKENS_ALIKE, most // _TOKENS_ALIKE)
    lines = [level.in_line for level in shared]
    parts = [array.tobytes() for level in shared for array in (level.rows, level.tokens)]
    return b"".join((repr((about, lines)).encode(), *parts))


def _groups(level: LevelPlan, page_size: int, *, has_spans: bool) -> Groups:
    rows, kv_lens = level.row_lens, level.kv_lens
    used = (rows > 0) & (kv_lens > 0)
    tokens = kv_lens[used]
    different = min(page_size * _num_different(level.kv_page_indices), int(tokens.sum()))
    return Groups(rows[used], tokens, different, has_spans and level.in_line)


def _num_different(pages: PageArray) -> int:
    """How many pages these are; the numbers themselves are small, and marking them takes a tenth of sorting them."""
    if not len(pages):
        return 0
    is_there = np.zeros(int(pages.max()) + 1, dtype=bool)
    is_there[pages] = True
    return int(np.count_nonzero(is_there))
