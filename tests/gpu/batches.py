"""Random batches for tests and benchmarks on a GPU, and attention over them in float32."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from seqattn.cache import PagedKVCacheManager
from seqattn.hybrid import pack_hybrid
from seqattn.packed import FlashInferHybridData, FlashInferPackedData
from tests.seqattn.truth import Batch, batch_of, pack

__all__ = ["Case", "attend", "fill", "hybrid", "pack", "random_batch", "relative_error"]

#: relative error of the norm that rounding explains
MOST_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """A model's heads and a cache's form."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    kv_layout: str = "NHD"

    def __str__(self) -> str:
        heads = f"{self.num_qo_heads}q{self.num_kv_heads}kv-d{self.head_dim}"
        return f"{heads}-page{self.page_size}-{str(self.dtype)[6:]}-{self.kv_layout}"

    def manager(self, batch: Batch, num_layers: int = 1) -> PagedKVCacheManager:
        num_pages = 1 + max(int(table.max()) for table in batch.tables)
        sizes = (num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        return PagedKVCacheManager(*sizes, self.dtype, "cuda", self.kv_layout, num_layers=num_layers)


def random_batch(seed: int, page_size: int, *, most_rows: int, most_tokens: int = 3000) -> Batch:
    """Up to 40 sequences: most continue a prefix of an earlier one; pages in random places, the batch shuffled."""
    rng = np.random.default_rng(seed)
    tables: list[list[int]] = []
    fresh = iter(rng.permutation(100 * most_tokens // page_size + 1000).tolist())
    for _ in range(int(rng.integers(2, 40))):
        model = tables[int(rng.integers(len(tables)))] if tables and rng.random() < 0.8 else []
        shared = model[: int(rng.integers(0, len(model) + 1))]
        num_own = int(rng.integers(1, max(2, most_tokens // page_size // (2 if shared else 1))))
        tables.append(shared + [next(fresh) for _ in range(num_own)])
    used = {page: i for i, page in enumerate(sorted({page for table in tables for page in table}))}
    order = rng.permutation(len(tables)).tolist()
    renumbered = [[used[page] for page in tables[i]] for i in order]
    last = [int(n) for n in rng.integers(1, page_size + 1, len(tables))]
    batch = batch_of(renumbered, last, page_size, [1] * len(tables))
    rows = [int(rng.integers(1, min(most_rows, n) + 1)) for n in batch.num_tokens]
    return batch._replace(query_lens=rows)


def hybrid(batch: Batch) -> FlashInferHybridData:
    """All levels of a batch."""
    return pack_hybrid(
        batch.tables, batch.num_tokens, page_size=batch.page_size, query_lens=batch.query_lens, cost_model=None
    )


def fill(manager: PagedKVCacheManager, seed: int) -> torch.Generator:
    """Random keys and values; returns the generator, to draw more from."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for cache in manager.get_memory_tensors():
        cache.normal_(generator=generator)
    return generator


def attend(
    manager: PagedKVCacheManager, batch: Batch, q: torch.Tensor, *, causal: bool = True, layer: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and base-2 lse in float32, sequence by sequence."""
    caches = [cache if manager.kv_layout == "NHD" else cache.transpose(1, 2) for cache in manager.layer_tensors(layer)]
    outs, lses = [], []
    split = torch.split(q.float(), batch.query_lens)
    for table, num_tokens, rows in zip(batch.tables, batch.num_tokens, split, strict=True):
        pages = torch.from_numpy(table).long().to(q.device)
        keys, values = (cache[pages].flatten(0, 1)[:num_tokens].float() for cache in caches)
        keys, values = (t.repeat_interleave(q.shape[1] // manager.num_heads, dim=1) for t in (keys, values))
        scores = torch.einsum("rhd,thd->hrt", rows, keys) / math.sqrt(manager.head_dim)
        if causal:
            limit = num_tokens - len(rows) + torch.arange(len(rows), device=q.device)
            scores.masked_fill_(torch.arange(num_tokens, device=q.device) > limit[:, None], -math.inf)
        outs.append(torch.einsum("hrt,thd->rhd", scores.softmax(-1), values))
        lses.append(torch.logsumexp(scores, -1).T / math.log(2))
    return torch.cat(outs), torch.cat(lses)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm; NaN is infinitely wrong."""
    error = float((found.float() - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error


def plain(batch: Batch) -> FlashInferPackedData:
    """The batch packed plainly."""
    return pack(batch)
