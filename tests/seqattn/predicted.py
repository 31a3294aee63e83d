"""What `CostModel` says of packed levels, page by page: the slow truth about the choices by its costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from seqattn.indptr import to_numpy
from seqattn.page_lists import concatenate

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn import CostModel, FlashInferHybridData
    from seqattn.packed import HybridLevel

    Int64Array = npt.NDArray[np.int64]


def predict_us(data: FlashInferHybridData, page_size: int, cost_model: CostModel) -> float:
    """The predicted time of one layer's attention over packed levels, in microseconds; O(pages log pages)."""
    pages = concatenate(to_numpy(level.kv_page_indices) for level in data.levels)
    by_page = [_by_page(level, page_size) for level in data.levels]
    rows, tokens = (np.concatenate([part[i] for part in by_page]) for i in (0, 1))
    different, index, times = np.unique(pages, return_inverse=True, return_counts=True)
    reads = tokens @ np.where(times[index] > 1, cost_model.again_us(rows), cost_model.first_us(rows))
    # A page may be full for one sequence and the partly filled last page of another.
    most_tokens = np.zeros(len(different), dtype=np.int64)
    np.maximum.at(most_tokens, index, tokens)
    extra = most_tokens @ np.where(times > 1, cost_model.memory_us - cost_model.reread_us, 0)
    return float(reads + extra) + cost_model.launch_us + (len(data.levels) - 1) * cost_model.level_overhead_us


def _by_page(level: HybridLevel, page_size: int) -> tuple[Int64Array, Int64Array]:
    """For each page that a level lists the rows of the group that reads it, and the tokens in it."""
    num_pages = np.diff(to_numpy(level.kv_page_indptr))
    tokens = np.full(int(num_pages.sum()), page_size, dtype=np.int64)
    has_pages = num_pages > 0
    tokens[np.cumsum(num_pages)[has_pages] - 1] = to_numpy(level.kv_last_page_len)[has_pages]
    return np.repeat(np.diff(to_numpy(level.qo_indptr)).astype(np.int64), num_pages), tokens
