"""Packing the running batch for hybrid attention, anew only where something besides its tails has changed.

While a batch decodes, each table grows at its end and all else stays. So the shared levels of the step before are given
out again, the same objects, and only the last level is made anew:

    step       level 0 (shared)      last level
    k          [0 1 2]               [5] [6 7] [8]
    k + 1      the same object       [5] [6 7 9] [8]      the second request needed a page

What says that nothing else has changed is the version of the page tables: it was the same just before the extension as
when the step before was packed, and is the same now as just after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import define

from seqattn.hybrid import pack_levels
from seqattn.packed import FlashInferHybridData, HybridLevel
from seqattn.page_lists import concatenate

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from radix.cache import PrefixCache
    from radix.integrations.transformers.scheduler import Growth
    from seqattn.hybrid import CostModel

__all__ = ["HybridPacker", "pack_rows"]

#: steps after which the cost model is asked again: what pays depends on lengths, slowly
_MOST_STEPS = 64


@define(slots=True, eq=False)
class _Packed:
    """A packed batch, the version of the tables, and for each request in group order its pages above the last level."""

    ids: list[Hashable]
    version: int
    data: FlashInferHybridData
    order: list[int]
    num_shared: list[int]
    num_steps: int = 0


class HybridPacker:
    """Packs batches of a cache that decode.

    Args:
        cache: whose sequences they are.
        cost_model: which shared runs become levels; None for all.

    Attributes:
        num_full, num_grown: batches packed in full, and from the step before.
    """

    def __init__(self, cache: PrefixCache, cost_model: CostModel | None) -> None:
        self.cache = cache
        self.cost_model = cost_model
        self.num_full = self.num_grown = 0
        self._last: _Packed | None = None

    def pack(self, ids: list[Hashable], growth: Growth | None) -> FlashInferHybridData:
        """The batch with one query row each, as `PrefixCache.pack_hybrid_for_flashinfer` packs it.

        Args:
            ids: of the requests.
            growth: versions of the page tables before and after they were extended by one token each.

        Cost: O(pages of the last level) where only tails have grown, else that of packing.
        """
        with self.cache.lock:
            last, version = self._last, self.cache.descriptor.tables_version
            only_grown = last is not None and growth == (last.version, version) and last.ids == ids
            if last is None or not only_grown or last.num_steps >= _MOST_STEPS:
                return self._pack(ids, version)
            self.num_grown += 1
            last.version = version
            last.num_steps += 1
            last.data = self._grown(last)
            return last.data

    def _pack(self, ids: list[Hashable], version: int) -> FlashInferHybridData:
        self.num_full += 1
        data = self.cache.pack_hybrid_for_flashinfer(ids, cost_model=self.cost_model)
        num_shared = np.zeros(len(ids), dtype=np.int64)
        for level in data.levels[:-1]:
            num_shared += np.repeat(np.diff(level.kv_page_indptr.numpy()), np.diff(level.qo_indptr.numpy()))
        self._last = _Packed(ids, version, data, data.order.tolist(), num_shared.tolist())
        return data

    def _grown(self, last: _Packed) -> FlashInferHybridData:
        """The same shared levels, and a last level as the tables are now."""
        tables, lens = self.cache.descriptor.tables(last.ids)
        own = [tables[i][begin:] for i, begin in zip(last.order, last.num_shared, strict=True)]
        indptr = np.zeros(len(own) + 1, dtype=np.int32)
        np.cumsum([len(pages) for pages in own], out=indptr[1:])
        last_lens = ((lens[last.order] - 1) % self.cache.tree.page_size + 1).astype(np.int32)
        parts = (torch.from_numpy(part) for part in (indptr, concatenate(own), last_lens))
        *shared, old = last.data.levels
        level = HybridLevel.trusted(old.qo_indptr, *parts)
        return FlashInferHybridData.trusted((*shared, level), last.data.order)


def pack_rows(
    cache: PrefixCache, ids: Sequence[Hashable], num_done: list[int], num_new: list[int], cost_model: CostModel | None
) -> FlashInferHybridData:
    """New tokens as sequences of one query row, each of the tokens up to its own; requests share what they share.

    Args:
        cache: whose sequences they are.
        ids: of the requests.
        num_done: tokens of each before the new ones.
        num_new: new tokens of each, at least 1, for which it has pages.
        cost_model: which shared runs become levels; None for all.

    Cost: that of packing as many sequences.
    """
    page_size = cache.tree.page_size
    lens = np.concatenate([np.arange(done + 1, done + new + 1) for done, new in zip(num_done, num_new, strict=True)])
    whose = np.repeat(np.arange(len(ids)), num_new).tolist()
    num_pages = (-(-lens // page_size)).tolist()
    # The pages that new tokens are written to are no level's: rows of one prompt see different parts of them.
    limits = np.repeat(np.array(num_done) // page_size, num_new).tolist()
    with cache.lock:
        tables, _ = cache.descriptor.tables(ids)
        row_tables = [tables[i][:count] for i, count in zip(whose, num_pages, strict=True)]
        return pack_levels(row_tables, lens, np.ones_like(lens), limits, cost_model, page_size=page_size)
