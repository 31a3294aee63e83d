"""A batch's page tables as levels of shared and unique pages, so that attention reads a shared prefix once.

    page_size 16, one query row each                            order [0 1 2 | 3 4 | 5]
    sequences a0 a1 a2 share pages 0 1 2                        rows       0    1    2     3    4        5
    sequences b0 b1    share pages 3 4                          level 0   [  0  1  2   ]  [  3  4    ]  [  ]
    sequence  x        shares none                              level 1   [5]  [6 7] [8]  [9] [10 11 12] [13]

A run of pages that sequences share (`seqattn.forest`), or a long one has (`seqattn.long_lists`), becomes a group of a
level; a sequence without a run at that level lies in a group without pages, one for all such neighbours. The last level
has what is left of each sequence: at least the pages that its new tokens are written to.

Invariants (`check_hybrid`):

- K1 per sequence, its pages over the levels, in order, equal its page table.
- K2 every level covers all rows; coarser boundaries are a subset of finer ones; the last level is never empty.
- K3 without a cost model a page is listed twice only if, for at least one of its sequences, it lies past that
  sequence's shareable pages, `(num_tokens - query_len) // page_size` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from seqattn.cost import CostModel
from seqattn.counts import one_integer_each
from seqattn.errors import BadValueError, InvariantError, LengthError
from seqattn.forest import Run, build_forest, without
from seqattn.indptr import to_numpy
from seqattn.levels import last_level, shared_levels, summed
from seqattn.long_lists import runs_to_keep
from seqattn.packed import FlashInferHybridData

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.pages import PageArray

    Int64Array = npt.NDArray[np.int64]

__all__ = [
    "CostModel",
    "check_hybrid",
    "model_of",
    "pack_hybrid",
    "pack_levels",
    "pack_runs",
    "rows_of",
]

#: of arrays of int32 without gaps
_SIDE_BY_SIDE = {(4,)}


def pack_hybrid(
    tables: Sequence[PageArray],
    num_tokens: Sequence[int] | Int64Array,
    *,
    page_size: int,
    query_lens: Sequence[int] | None,
    cost_model: CostModel | Literal["auto"] | None,
) -> FlashInferHybridData:
    """Packs a batch into levels.

    Args:
        tables: each sequence's page table, int32 [ceil(num_tokens / page_size)].
        num_tokens: tokens of each sequence, new ones included.
        page_size: token slots in a page.
        query_lens: query rows of each sequence, its last tokens: in [1, num_tokens]. None for one each.
        cost_model: None keeps every shared run as a level. A `CostModel` drops runs that do not pay, possibly all: one
            level then, in the caller's order. One with a device also cuts long lists (`seqattn.long_lists`).
            `PagedAttention.cost_model` is the one for its heads; `"auto"` is that of 32 query heads, 8 KV heads and
            head_dim 128 in 16 bits, on an H200.

    Returns:
        Levels of int32 CPU tensors that share no memory with the tables, and the order of the sequences in them.

    Raises:
        LengthError: lists of different lengths, a table that does not fit its tokens, or a query_len out of range. A
            sequence without query rows reads nothing: leave it out of the batch.
        BadValueError: `cost_model` is something else.

    Cost: each page is read about twice, about three numpy calls for each sequence and level.
    """
    lens, rows = _checked(tables, num_tokens, page_size, query_lens)
    model = model_of(cost_model)
    if not {table.strides for table in tables} <= _SIDE_BY_SIDE:
        tables = [np.ascontiguousarray(table, dtype=np.int32) for table in tables]
    return pack_levels(tables, lens, rows, (lens - rows) // page_size, model, page_size=page_size)


def pack_levels(
    tables: Sequence[PageArray],
    lens: Int64Array,
    rows: Int64Array,
    limits: Int64Array,
    model: CostModel | None,
    *,
    page_size: int,
) -> FlashInferHybridData:
    """`pack_hybrid` of checked arguments.

    Args:
        tables: each sequence's page table, int32, contiguous.
        lens: its tokens, int64 [batch].
        rows: its query rows, int64 [batch].
        limits: pages of it that levels above the last may have, int64 [batch]: those behind them are written, or seen
            by some of its rows only.
        model: which shared runs to keep, and which long lists to cut; None for all and none.
        page_size: token slots in a page.
    """
    order, runs = build_forest(tables, limits.tolist())
    if model is not None and order:
        places = np.array(order)
        its = summed(rows[places]), lens[places], limits[places]
        runs = runs_to_keep(runs, *its, page_size, model)
    return pack_runs(tables, lens, rows, (order, runs), None, page_size=page_size)


def pack_runs(
    tables: Sequence[PageArray],
    lens: Int64Array,
    rows: Int64Array,
    forest: tuple[list[int], list[Run]],
    kept: list[bool] | None,
    *,
    page_size: int,
) -> FlashInferHybridData:
    """The batch with these runs of its forest as groups; unchecked.

    Args:
        tables: each sequence's page table.
        lens: its tokens, int64 [batch].
        rows: its query rows, int64 [batch].
        forest: what `build_forest` returned.
        kept: for each run whether to keep it; None keeps all. Without any the order is the caller's.
        page_size: token slots in a page.
    """
    order, runs = forest
    if kept is not None:
        runs, _ = without(runs, kept)
    order = order if runs else list(range(len(tables)))
    places = np.array(order, dtype=np.int64)  # once: a list of numbers takes as long as all the rest to convert
    ordered, rows_before, its_lens = [tables[i] for i in order], summed(rows[places]), lens[places]
    levels = shared_levels(runs, ordered, rows_before, page_size)
    levels.append(last_level(runs, ordered, rows_before, its_lens, page_size))
    return FlashInferHybridData.trusted(tuple(levels), torch.from_numpy(places))


def _checked(
    tables: Sequence[PageArray],
    num_tokens: Sequence[int] | Int64Array,
    page_size: int,
    query_lens: Sequence[int] | None,
) -> tuple[Int64Array, Int64Array]:
    """Tokens and query rows of each sequence, int64 [batch]."""
    lens = one_integer_each("num_tokens", num_tokens, len(tables))
    rows = rows_of(query_lens, lens)
    num_pages = np.array([len(table) for table in tables], dtype=np.int64)
    wrong = np.flatnonzero(num_pages != -(-lens // page_size))
    if len(wrong):
        i = int(wrong[0])
        raise LengthError(f"tables[{i}] has {num_pages[i]} pages of {page_size} for {lens[i]} tokens")
    return lens, rows


def rows_of(query_lens: Sequence[int] | None, lens: Int64Array) -> Int64Array:
    """Query rows of each sequence, int64 [batch]; LengthError where its tokens have not as many, or none."""
    rows = np.ones_like(lens) if query_lens is None else one_integer_each("query_lens", query_lens, len(lens))
    wrong = np.flatnonzero((rows < 1) | (rows > lens))
    if len(wrong):
        i = int(wrong[0])
        raise LengthError(
            f"query_lens[{i}] is {rows[i]} for a sequence of {lens[i]} tokens: in a hybrid batch every sequence has at "
            "least one query row, and its rows are its last tokens"
        )
    return rows


def model_of(cost_model: CostModel | Literal["auto"] | None) -> CostModel | None:
    """The model that is meant; raises BadValueError for anything else."""
    if cost_model is None or isinstance(cost_model, CostModel):
        return cost_model
    if cost_model == "auto":
        return _auto()
    raise BadValueError(f"cost_model must be None, 'auto' or a CostModel, not {cost_model!r}")


@lru_cache(maxsize=1)
def _auto() -> CostModel:
    """One model for all calls, which remembers what it has chosen."""
    return CostModel.for_heads(32, 8, 128, 2)


def check_hybrid(
    data: FlashInferHybridData,
    tables: Sequence[PageArray],
    num_tokens: Sequence[int] | Int64Array,
    query_lens: Sequence[int] | None,
    page_size: int,
    cost_model: CostModel | Literal["auto"] | None = None,
) -> None:
    """Proves B1, B2 and K1 to K3 (K3 only without a cost model) of packed levels; slow.

    Raises:
        InvariantError: naming the invariant that does not hold.
    """
    data.check(page_size)
    lens, rows = _checked(tables, num_tokens, page_size, query_lens)
    order = data.order.tolist()
    last = data.levels[-1]
    if np.diff(to_numpy(last.qo_indptr)).tolist() != rows[order].tolist():
        raise InvariantError("K2", f"the last level has rows {last.qo_indptr.tolist()} for query_lens {rows[order]}")
    for i, (got, table) in enumerate(zip(data.unpack(), tables, strict=True)):
        if got.tolist() != np.asarray(table).tolist():
            raise InvariantError("K1", f"sequence {i} has pages {got.tolist()}, not {np.asarray(table).tolist()}")
    if last.kv_last_page_len.tolist() != ((lens[order] - 1) % page_size + 1).tolist():
        raise InvariantError("K1", f"last_page_len {last.kv_last_page_len.tolist()} for {lens[order]} tokens")
    for level in data.levels[:-1]:
        if not set(level.kv_last_page_len.tolist()) <= {0, page_size}:
            raise InvariantError("K1", f"a shared page is not full: {level.kv_last_page_len.tolist()}")
    if cost_model is None:
        _check_k3(data, [tables[i] for i in order], ((lens - rows) // page_size)[order].tolist())


def _check_k3(data: FlashInferHybridData, tables: list[PageArray], limits: list[int]) -> None:
    first_rows = to_numpy(data.levels[-1].qo_indptr)[:-1]
    indptrs = [to_numpy(level.kv_page_indptr) for level in data.levels]
    groups = [np.searchsorted(to_numpy(level.qo_indptr), first_rows, side="right") - 1 for level in data.levels]
    #: each list of leading pages that may be shared, and the (level, group) in which its last page is listed
    listed: dict[tuple[int, ...], tuple[int, int]] = {}
    for i, (table, limit) in enumerate(zip(tables, limits, strict=True)):
        places = [
            (level, int(group[i]))
            for level, (group, indptr) in enumerate(zip(groups, indptrs, strict=True))
            for _ in range(indptr[group[i]], indptr[group[i] + 1])
        ]
        for end in range(1, limit + 1):
            prefix = tuple(table[:end].tolist())
            if listed.setdefault(prefix, places[end - 1]) != places[end - 1]:
                raise InvariantError("K3", f"page {prefix[-1]} is listed in {listed[prefix]} and in {places[end - 1]}")
