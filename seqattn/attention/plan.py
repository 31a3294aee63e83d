"""One step's batch as a backend computes it: plain data is one level, hybrid data several.

Rows come and go in the caller's order; in between they stand in group order:

    caller's rows      a a | b | c c c        query_lens [2 1 3], order [2 0 1]
    group order        c c c | a a | b        rows [3 4 5 0 1 2]: where the rows of the groups stand with the caller
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import define

from seqattn.errors import LengthError, PageError, TensorError
from seqattn.indptr import group_lengths, to_numpy
from seqattn.packed import FlashInferHybridData, FlashInferPackedData, HybridLevel

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from seqattn.cache import PagedKVCacheManager
    from seqattn.pages import PageArray

    Int64Array = npt.NDArray[np.int64]

__all__ = ["BatchPlan", "LevelPlan", "plan_batch"]


@define(slots=True, frozen=True, eq=False)
class LevelPlan:
    """The groups of one level, on the CPU.

    Attributes:
        qo_indptr: where each group's rows begin, int64 [groups + 1].
        kv_page_indptr: where each group's pages begin, int64 [groups + 1].
        kv_page_indices: page numbers, int32 [pages]; a copy, so that the packed tensors may be reused.
        kv_lens: tokens of each group, int64 [groups].
        causal: rows are the last tokens of their group and see no token after themselves.
    """

    qo_indptr: Int64Array
    kv_page_indptr: Int64Array
    kv_page_indices: PageArray
    kv_lens: Int64Array
    causal: bool


@define(slots=True, frozen=True, eq=False)
class BatchPlan:
    """What `plan` found out about a batch.

    Attributes:
        levels: coarsest first; only the last one may be causal.
        num_rows: query rows of the batch.
        rows: the caller's row that is row i in group order, int64 [num_rows]; None if the two are the same.
    """

    levels: tuple[LevelPlan, ...]
    num_rows: int
    rows: Int64Array | None


def plan_batch(
    manager: PagedKVCacheManager,
    packed: FlashInferPackedData | FlashInferHybridData,
    query_lens: Sequence[int] | None,
    *,
    causal: bool,
) -> BatchPlan:
    """Checks a batch against its manager and brings both kinds of data into one form; O(pages).

    Raises:
        TensorError: `packed` is neither kind.
        LengthError: query_lens that do not fit, more causal rows than tokens, or broken packed data.
        PageError: a page that the manager does not have.
    """
    # Callers without type checks pass anything.
    given: object = packed
    if isinstance(given, FlashInferPackedData):
        given.validate(manager.page_size)
        level = _plain_level(given, query_lens)
        return BatchPlan((_level_plan(manager, level, causal=causal),), level.num_rows, None)
    if not isinstance(given, FlashInferHybridData):
        raise TensorError(f"plan needs FlashInferPackedData or FlashInferHybridData, not {type(given).__name__}")
    for level in given.levels:
        level.validate(manager.page_size)
    shared = [_level_plan(manager, level, causal=False) for level in given.levels[:-1]]
    levels = (*shared, _level_plan(manager, given.levels[-1], causal=causal))
    num_rows = [int(level.qo_indptr[-1]) for level in levels]
    if len(set(num_rows)) > 1:
        raise LengthError(f"levels cover {num_rows} rows: each must cover the batch")
    return BatchPlan(levels, num_rows[-1], _caller_rows(given, levels[-1].qo_indptr, query_lens))


def _plain_level(packed: FlashInferPackedData, query_lens: Sequence[int] | None) -> HybridLevel:
    lens = np.ones(packed.num_sequences, dtype=np.int64)
    if query_lens is not None:
        lens = _query_lens(query_lens, packed.num_sequences)
    qo_indptr = torch.from_numpy(np.concatenate(([0], np.cumsum(lens))).astype(np.int32))
    return HybridLevel.trusted(qo_indptr, packed.kv_page_indptr, packed.kv_page_indices, packed.kv_last_page_len)


def _query_lens(query_lens: Sequence[int], num_sequences: int) -> Int64Array:
    array: npt.NDArray[Any] = np.asarray(query_lens)
    if array.shape != (num_sequences,) or (array.dtype.kind not in "iu" and num_sequences):
        raise LengthError(f"query_lens must be one integer for each of {num_sequences} sequences, not {query_lens!r}")
    if (array < 0).any():
        raise LengthError(f"query_lens holds {array.min()}: a sequence has 0 rows or more")
    return array.astype(np.int64, copy=False)


def _caller_rows(
    data: FlashInferHybridData, qo_indptr: Int64Array, query_lens: Sequence[int] | None
) -> Int64Array | None:
    """`BatchPlan.rows` of hybrid data; raises LengthError if the caller's query_lens are not the packed ones."""
    order, lens = to_numpy(data.order), np.diff(qo_indptr)
    packed_lens = np.empty_like(lens)
    packed_lens[order] = lens
    if query_lens is not None and _query_lens(query_lens, len(lens)).tolist() != packed_lens.tolist():
        raise LengthError(f"query_lens {list(query_lens)} differ from those it was packed with: {packed_lens}")
    if (order == np.arange(len(order))).all():
        return None
    begins = np.cumsum(packed_lens) - packed_lens
    rows: Int64Array = np.arange(qo_indptr[-1]) + np.repeat(begins[order] - qo_indptr[:-1], lens)
    return rows


def _level_plan(manager: PagedKVCacheManager, level: HybridLevel, *, causal: bool) -> LevelPlan:
    pages = to_numpy(level.kv_page_indices).astype(np.int32)
    if len(pages) and not pages.max() < manager.num_pages:
        raise PageError(f"page {pages.max()} is not in [0, {manager.num_pages}): the batch belongs to another manager")
    qo_indptr, indptr = (to_numpy(tensor).astype(np.int64) for tensor in (level.qo_indptr, level.kv_page_indptr))
    kv_lens = group_lengths(indptr, to_numpy(level.kv_last_page_len), manager.page_size)
    lens = np.diff(qo_indptr)
    if causal and (lens > kv_lens).any():
        i = int((lens > kv_lens).argmax())
        raise LengthError(f"{lens[i]} query rows for {kv_lens[i]} tokens in causal attention: rows are the last tokens")
    return LevelPlan(qo_indptr, indptr, pages, kv_lens, causal)
