"""Attention in plain torch, on any device: what a kernel computes, written out.

    scores = softcap(q k^T * sm_scale)         softcap(s) = c * tanh(s / c), or s without a cap
    lse    = log2(sum(exp(scores)))
    out    = sum(exp(scores) / 2**lse * v)

A level is cut into items of neighbouring rows that read one list of pages, and items of like size are computed
together, padded to the largest of them:

    page_size 4, causal, a row sees the first `limit` tokens
    item      rows 0 1 2   pages 7 2 5   limits 8 9 10
    item      rows 3 4     pages 6 1     limits 5 6
    together  rows [[3 4 0], [0 1 2]]    pages [[6 1 0], [7 2 5]]    limits [[5 6 0], [8 9 10]]

Padding rows have limit 0, and the tokens of padding pages lie beyond every limit.

Levels are merged by log-sum-exp: two parts of one softmax, each normalised by itself, add up weighted by 2**lse.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import define

from seqattn.cache import as_bits

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.attention.plan import BatchPlan, LevelPlan
    from seqattn.cache import PagedKVCacheManager
    from seqattn.pages import PageArray

    Int64Array = npt.NDArray[np.int64]

__all__ = ["TorchBackend", "merge_states"]

#: elements of the largest temporaries (scores, gathered keys and values) that are computed at once
_MAX_ELEMENTS = 1 << 25


@define(slots=True, frozen=True, eq=False)
class _Item:
    """Neighbouring rows of one group."""

    first_row: int
    pages: PageArray  # int32 [pages of the group]
    limits: Int64Array  # [rows], how many of the group's tokens each row sees, at least 1


@define(slots=True, frozen=True, eq=False)
class _Batch:
    """Items of like size, padded; drawn at the top of this file. int64 tensors on the cache's device."""

    pages: torch.Tensor  # [items, pages]
    rows: torch.Tensor  # [items, rows]
    limits: torch.Tensor  # [items, rows]


class TorchBackend:
    """Computes a planned batch over a manager's pages.

    Args:
        manager: the pages.
        num_qo_heads: query heads, a multiple of the manager's.
        sm_scale: factor of the scores.
        logits_soft_cap: bound of the scores, or None.
    """

    #: rows come in group order
    orders_rows = False
    #: nobody has measured it
    costs = None

    def __init__(
        self, manager: PagedKVCacheManager, num_qo_heads: int, sm_scale: float, logits_soft_cap: float | None
    ) -> None:
        self.manager = manager
        self.num_qo_heads = num_qo_heads
        self.sm_scale = sm_scale
        self.logits_soft_cap = logits_soft_cap

    def prepare(self, plan: BatchPlan) -> list[list[_Batch]]:
        """What `run` needs of a plan: for each level its padded batches."""
        return [self._batches(_items(level, self._max_rows(level))) for level in plan.levels]

    def run(
        self,
        q: torch.Tensor,
        layer: int,
        prepared: list[list[_Batch]],
        *,
        return_lse: bool,  # noqa: ARG002  it is computed anyway
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and base-2 log-sum-exp of rows in group order.

        Args:
            q: [rows, num_qo_heads, head_dim].
            layer: the layer of the cache to read.
            prepared: what `prepare` returned.
            return_lse: no matter.

        Returns:
            Output like `q`, and float32 [rows, num_qo_heads]; a row that sees nothing has output 0 and -inf.
        """
        work = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        caches = [_by_head(cache, self.manager.kv_layout) for cache in self.manager.layer_tensors(layer)]
        out, lse = self._level(work, caches, prepared[-1])
        for batches in prepared[:-1]:
            out, lse = merge_states(out, lse, *self._level(work, caches, batches))
        return out.to(q.dtype), lse.to(torch.float32)

    def _max_rows(self, level: LevelPlan) -> int:
        """Rows of an item, so that its scores stay below the bound on temporaries."""
        longest = int(level.kv_lens.max(initial=1))
        return max(1, _MAX_ELEMENTS // (max(longest, 1) * self.num_qo_heads))

    def _batches(self, items: list[_Item]) -> list[_Batch]:
        """Items of like size together, each batch below the bound on temporaries."""
        items = sorted(items, key=lambda item: (len(item.limits), len(item.pages)))
        batches: list[list[_Item]] = []
        for item in items:
            num_rows, num_pages = len(item.limits), len(item.pages)
            size = self._num_elements(num_rows, num_pages)
            # Padding at most doubles either side; the items before are no larger than this one in rows.
            fits = batches and (
                (len(batches[-1]) + 1) * size <= _MAX_ELEMENTS
                and num_rows <= 2 * len(batches[-1][0].limits)
                and num_pages <= 2 * len(batches[-1][0].pages)
                and num_pages >= len(batches[-1][-1].pages)
            )
            if fits:
                batches[-1].append(item)
            else:
                batches.append([item])
        return [_padded(batch, self.manager.device) for batch in batches]

    def _num_elements(self, num_rows: int, num_pages: int) -> int:
        per_token = self.num_qo_heads * num_rows + 2 * self.manager.num_heads * self.manager.head_dim
        return num_pages * self.manager.page_size * per_token

    def _level(
        self, q: torch.Tensor, caches: list[torch.Tensor], batches: list[_Batch]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:2], -math.inf)
        for batch in batches:
            some_out, some_lse = self._attend(q[batch.rows], caches, batch)
            real = batch.limits > 0
            out[batch.rows[real]] = some_out[real]
            lse[batch.rows[real]] = some_lse[real]
        return out, lse

    def _attend(self, q: torch.Tensor, caches: list[torch.Tensor], batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [items, rows, heads, head_dim] and lse [items, rows, heads] of one batch."""
        num_items, num_rows, num_heads, head_dim = q.shape
        num_kv_heads = self.manager.num_heads
        keys, values = (_gathered(cache, batch.pages, q.dtype) for cache in caches)
        token = torch.arange(keys.shape[2], device=q.device)
        # What lies beyond a sequence's last token may be anything, NaN too, and 0 * NaN is NaN.
        beyond = token >= batch.limits.amax(dim=1, keepdim=True)
        values.masked_fill_(beyond[:, None, :, None], 0)
        # Query heads that share a KV head become rows of one matrix: [items, KV heads, heads of each * rows, head_dim].
        grouped = q.view(num_items, num_rows, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
        scores = grouped.reshape(num_items, num_kv_heads, -1, head_dim) * self.sm_scale @ keys.transpose(-1, -2)
        if self.logits_soft_cap is not None:
            scores = self.logits_soft_cap * torch.tanh(scores / self.logits_soft_cap)
        by_row = scores.view(num_items, num_kv_heads, -1, num_rows, len(token))
        by_row.masked_fill_((token >= batch.limits[..., None])[:, None, None], -math.inf)
        lse = torch.logsumexp(by_row, dim=-1, keepdim=True)
        out = torch.exp(by_row - lse).view_as(scores) @ values
        out = out.view(num_items, num_kv_heads, -1, num_rows, head_dim).permute(0, 3, 1, 2, 4)
        lse = lse.squeeze(-1).permute(0, 3, 1, 2) / math.log(2)
        return out.reshape(num_items, num_rows, num_heads, head_dim), lse.reshape(num_items, num_rows, num_heads)


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint parts of the tokens, from that over each.

    Args:
        out_a: output of the first part, [rows, heads, head_dim].
        lse_a: its base-2 log-sum-exp, [rows, heads]; -inf for a part without tokens.
        out_b: output of the second part.
        lse_b: its log-sum-exp.

    Returns:
        Output and lse of both parts together; 0 and -inf where both are without tokens.
    """
    top = torch.maximum(lse_a, lse_b)
    top = top.masked_fill(top == -math.inf, 0)
    weight_a, weight_b = torch.exp2(lse_a - top), torch.exp2(lse_b - top)
    total = weight_a + weight_b
    share = (weight_b / total).masked_fill(total == 0, 0)[..., None]
    return torch.lerp(out_a, out_b, share), torch.log2(total) + top


def _items(level: LevelPlan, max_rows: int) -> list[_Item]:
    """The rows of a level that see anything, at most `max_rows` of a group together."""
    items = []
    indptrs = (level.qo_indptr.tolist(), level.kv_page_indptr.tolist())
    for i, kv_len in enumerate(level.kv_lens.tolist()):
        (first, stop), (first_page, stop_page) = (indptr[i : i + 2] for indptr in indptrs)
        if kv_len == 0:
            continue
        pages = level.kv_page_indices[first_page:stop_page]
        for begin in range(first, stop, max_rows):
            end = min(begin + max_rows, stop)
            limits = np.full(end - begin, kv_len, dtype=np.int64)
            if level.causal:  # the last row sees all, each row before it one token less
                limits = kv_len - stop + 1 + np.arange(begin, end)
            items.append(_Item(begin, pages, limits))
    return items


def _padded(items: list[_Item], device: torch.device) -> _Batch:
    num_rows, num_pages = max(len(item.limits) for item in items), max(len(item.pages) for item in items)
    pages = np.zeros((len(items), num_pages), dtype=np.int64)
    rows, limits = (np.zeros((len(items), num_rows), dtype=np.int64) for _ in range(2))
    for i, item in enumerate(items):
        pages[i, : len(item.pages)] = item.pages
        rows[i, : len(item.limits)] = np.arange(item.first_row, item.first_row + len(item.limits))
        limits[i, : len(item.limits)] = item.limits
    return _Batch(*(torch.from_numpy(array).to(device) for array in (pages, rows, limits)))


def _by_head(cache: torch.Tensor, kv_layout: str) -> torch.Tensor:
    """One layer as [pages, heads, slots, head_dim], whatever its layout; a view."""
    return cache if kv_layout == "HND" else cache.transpose(1, 2)


def _gathered(cache: torch.Tensor, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values of lists of pages, [lists, heads, slots of all pages, head_dim], ready to compute with."""
    picked = as_bits(cache)[pages].view(cache.dtype).to(dtype)
    return picked.permute(0, 2, 1, 3, 4).flatten(2, 3)
