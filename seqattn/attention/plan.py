"""One step's batch as a backend computes it: plain data is one level, hybrid data several.

Rows come and go in the caller's order; in between they stand in group order:

    caller's rows      a a | b | c c c        query_lens [2 1 3], order [2 0 1]
    group order        c c c | a a | b        rows [3 4 5 0 1 2]: where the rows of the groups stand with the caller
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import define

from seqattn.counts import one_integer_each
from seqattn.errors import LengthError, PageError, TensorError
from seqattn.indptr import group_lengths, to_numpy
from seqattn.packed import FlashInferHybridData, FlashInferPackedData, HybridLevel
from seqattn.page_lists import indptr_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from seqattn.cache import PagedKVCacheManager
    from seqattn.pages import PageArray

    Int32Array = npt.NDArray[np.int32]
    Int64Array = npt.NDArray[np.int64]

__all__ = ["BatchPlan", "LevelPlan", "Planner", "plan_batch"]


@define(slots=True, frozen=True, eq=False)
class LevelPlan:
    """The groups of one level, on the CPU.

    Attributes:
        qo_indptr: where each group's rows begin, int32 [groups + 1].
        kv_page_indptr: where each group's pages begin, int32 [groups + 1].
        kv_page_indices: page numbers, int32 [pages].
        kv_last_page_len: tokens in each group's last page, int32 [groups].
        page_size: token slots of a page.
        causal: rows are the last tokens of their group and see no token after themselves.
        decodes: each group has one row, and pages.
    """

    qo_indptr: Int32Array
    kv_page_indptr: Int32Array
    kv_page_indices: PageArray
    kv_last_page_len: Int32Array
    page_size: int
    causal: bool
    decodes: bool

    @property
    def row_lens(self) -> Int64Array:
        """Rows of each group, int64 [groups]; made anew."""
        return (self.qo_indptr[1:] - self.qo_indptr[:-1]).astype(np.int64)

    @property
    def page_lens(self) -> Int64Array:
        """Pages of each group, int64 [groups]; made anew."""
        return (self.kv_page_indptr[1:] - self.kv_page_indptr[:-1]).astype(np.int64)

    @property
    def kv_lens(self) -> Int64Array:
        """Tokens of each group, int64 [groups]; made anew."""
        return group_lengths(self.kv_page_indptr, self.kv_last_page_len, self.page_size)

    @property
    def in_line(self) -> bool:
        """Whether one group has all pages, full ones, each the next in memory; O(pages)."""
        pages, last = self.kv_page_indices, self.kv_last_page_len
        if np.count_nonzero(self.kv_page_indptr[1:] > self.kv_page_indptr[:-1]) != 1 or last.max() != self.page_size:
            return False
        return bool((pages[1:] - pages[:-1] == 1).all())


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


class Planner:
    """Checks batches against a manager and brings both kinds of data into one form.

    While a batch decodes, only its last level changes. What the levels above were found to be is kept, and the same
    objects are given out again for a batch that has the same: whoever made something of them need not look at them.
    """

    def __init__(self, manager: PagedKVCacheManager) -> None:
        self._manager = manager
        self._shared: list[tuple[tuple[bytes, ...], LevelPlan]] = []
        self._rows: tuple[tuple[bytes, ...], Int64Array | None] | None = None

    def plan(
        self,
        packed: FlashInferPackedData | FlashInferHybridData,
        query_lens: Sequence[int] | None,
        *,
        causal: bool,
    ) -> BatchPlan:
        """A batch as levels; those of the last level are views of its tensors. O(pages).

        Raises:
            TensorError: `packed` is neither kind.
            LengthError: query_lens that do not fit, more causal rows than tokens, or broken packed data.
            PageError: a page that the manager does not have.
        """
        # Callers without type checks pass anything.
        given: object = packed
        if isinstance(given, FlashInferPackedData):
            level = _plain_level(given, query_lens)
            found = _level_plan(self._manager, level, causal=causal, one_each=query_lens is None)
            return BatchPlan((found,), int(found.qo_indptr[-1]), None)
        if not isinstance(given, FlashInferHybridData):
            raise TensorError(f"plan needs FlashInferPackedData or FlashInferHybridData, not {type(given).__name__}")
        shared = [self._kept(i, level) for i, level in enumerate(given.levels[:-1])]
        levels = (*(level for _, level in shared), _level_plan(self._manager, given.levels[-1], causal=causal))
        num_rows = [int(level.qo_indptr[-1]) for level in levels]
        if len(set(num_rows)) > 1:
            raise LengthError(f"levels cover {num_rows} rows: each must cover the batch")
        rows = self._kept_rows(given, levels[-1], query_lens)
        self._shared = shared
        return BatchPlan(levels, num_rows[-1], rows)

    def _kept(self, i: int, level: HybridLevel) -> tuple[tuple[bytes, ...], LevelPlan]:
        """A level above the last: what the same one was found to be, or what it is found to be now."""
        tensors = (level.qo_indptr, level.kv_page_indptr, level.kv_page_indices, level.kv_last_page_len)
        key = tuple(to_numpy(tensor).tobytes() for tensor in tensors)
        is_int32 = all(tensor.dtype == torch.int32 for tensor in tensors)
        if is_int32 and i < len(self._shared) and self._shared[i][0] == key:
            return self._shared[i]
        # Later packs may be made in the same memory.
        return key, _level_plan(self._manager, level, causal=False, is_copied=True)

    def _kept_rows(
        self, data: FlashInferHybridData, last: LevelPlan, query_lens: Sequence[int] | None
    ) -> Int64Array | None:
        key = (to_numpy(data.order).tobytes(), last.qo_indptr.tobytes())
        if query_lens is None and self._rows is not None and self._rows[0] == key:
            return self._rows[1]
        rows = _caller_rows(data, last, query_lens)
        self._rows = key, rows
        return rows


def plan_batch(
    manager: PagedKVCacheManager,
    packed: FlashInferPackedData | FlashInferHybridData,
    query_lens: Sequence[int] | None,
    *,
    causal: bool,
) -> BatchPlan:
    """A batch as `Planner.plan` sees it that has seen none before."""
    return Planner(manager).plan(packed, query_lens, causal=causal)


def _plain_level(packed: FlashInferPackedData, query_lens: Sequence[int] | None) -> HybridLevel:
    if query_lens is None:
        qo_indptr = np.arange(packed.num_sequences + 1, dtype=np.int32)
    else:
        qo_indptr = indptr_of(_query_lens(query_lens, packed.num_sequences))
    tensors = (packed.kv_page_indptr, packed.kv_page_indices, packed.kv_last_page_len)
    return HybridLevel.trusted(torch.from_numpy(qo_indptr), *tensors)


def _query_lens(query_lens: Sequence[int], num_sequences: int) -> Int64Array:
    lens = one_integer_each("query_lens", query_lens, num_sequences)
    if (lens < 0).any():
        raise LengthError(f"query_lens holds {lens.min()}: a sequence has 0 rows or more")
    return lens


def _caller_rows(data: FlashInferHybridData, last: LevelPlan, query_lens: Sequence[int] | None) -> Int64Array | None:
    """`BatchPlan.rows` of hybrid data; raises LengthError if the caller's query_lens are not the packed ones."""
    order, lens = to_numpy(data.order), last.row_lens
    packed_lens = np.empty_like(lens)
    packed_lens[order] = lens
    if query_lens is not None and _query_lens(query_lens, len(lens)).tolist() != packed_lens.tolist():
        raise LengthError(f"query_lens {list(query_lens)} differ from those it was packed with: {packed_lens}")
    if (order == np.arange(len(order))).all():
        return None
    begins = np.cumsum(packed_lens) - packed_lens
    rows: Int64Array = np.arange(last.qo_indptr[-1]) + np.repeat(begins[order] - last.qo_indptr[:-1], lens)
    return rows


def _level_plan(
    manager: PagedKVCacheManager, level: HybridLevel, *, causal: bool, one_each: bool = False, is_copied: bool = False
) -> LevelPlan:
    """A level after its checks.

    Args:
        manager: the pages.
        level: the level.
        causal: as in `LevelPlan`.
        one_each: its rows are known to be one for each group.
        is_copied: the arrays share no memory with its tensors.
    """
    page_size = manager.page_size
    tensors = (level.qo_indptr, level.kv_page_indptr, level.kv_page_indices, level.kv_last_page_len)
    if any(tensor.dtype != torch.int32 or tensor.ndim != 1 for tensor in tensors):
        level.validate(page_size)
    qo_indptr, indptr, pages, last = [to_numpy(tensor) for tensor in tensors]
    is_usual = _is_usual(indptr, last, len(pages), page_size)
    one_each = one_each or (len(qo_indptr) == len(last) + 1 and bool((qo_indptr == np.arange(len(qo_indptr))).all()))
    if not (is_usual and (one_each or _is_indptr(qo_indptr, len(last)))):
        level.validate(page_size)
    # As an unsigned number a negative one is too large as well.
    if len(pages) and not pages.view(np.uint32).max() < manager.num_pages:
        level.validate(page_size)
        raise PageError(f"page {pages.max()} is not in [0, {manager.num_pages}): the batch belongs to another manager")
    arrays = (qo_indptr, indptr, pages, last)
    if is_copied:
        arrays = (qo_indptr.copy(), indptr.copy(), pages.copy(), last.copy())
    found = LevelPlan(*arrays, page_size, causal, is_usual and one_each)
    if causal and not found.decodes:
        _check_causal(found.row_lens, found.kv_lens)
    return found


def _check_causal(row_lens: Int64Array, kv_lens: Int64Array) -> None:
    if (row_lens > kv_lens).any():
        i = int((row_lens > kv_lens).argmax())
        raise LengthError(
            f"{row_lens[i]} query rows for {kv_lens[i]} tokens in causal attention: rows are the last tokens"
        )


def _is_usual(indptr: Int32Array, last: Int32Array, num_pages: int, page_size: int) -> bool:
    """Whether B1 and B2 hold for the pages, and every group has some."""
    if not len(last) or len(indptr) != len(last) + 1 or indptr[0] != 0 or indptr[-1] != num_pages:
        return False
    return bool((indptr[1:] > indptr[:-1]).all() and last.min() >= 1 and last.max() <= page_size)


def _is_indptr(indptr: Int32Array, num_entries: int) -> bool:
    return len(indptr) == num_entries + 1 and indptr[0] == 0 and bool((indptr[1:] >= indptr[:-1]).all())
