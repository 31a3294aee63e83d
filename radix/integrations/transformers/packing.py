"""Packing new tokens of prompts as rows of a decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from seqattn.hybrid import pack_levels

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from radix.cache import PrefixCache
    from seqattn.hybrid import CostModel
    from seqattn.packed import FlashInferHybridData

__all__ = ["pack_rows"]


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
    limits = np.repeat(np.array(num_done, dtype=np.int64) // page_size, num_new)
    with cache.lock:
        tables, _ = cache.descriptor.tables(ids)
        row_tables = [tables[i][:count] for i, count in zip(whose, num_pages, strict=True)]
        return pack_levels(row_tables, lens, np.ones_like(lens), limits, cost_model, page_size=page_size)
