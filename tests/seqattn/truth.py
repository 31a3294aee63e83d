"""Slow, obvious versions of what seqattn computes, and random batches to compare on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from seqattn.cache import PagedKVCacheManager
from seqattn.packed import FlashInferPackedData

Table = npt.NDArray[np.int32]


class Batch(NamedTuple):
    """Sequences by their page tables."""

    page_size: int
    tables: list[Table]
    num_tokens: list[int]
    query_lens: list[int]

    @property
    def limits(self) -> list[int]:
        """Shareable pages of each sequence."""
        return [(n - m) // self.page_size for n, m in zip(self.num_tokens, self.query_lens, strict=True)]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch_of(tables: Sequence[Sequence[int]], last: Sequence[int], page_size: int, query_lens: Sequence[int]) -> Batch:
    num_tokens = [(len(table) - 1) * page_size + n for table, n in zip(tables, last, strict=True)]
    return Batch(page_size, [np.array(table, dtype=np.int32) for table in tables], num_tokens, list(query_lens))


#: the forest of three conversations with one system prompt, two with another, and one with none
FOREST = batch_of(
    [[0, 1, 2, 5], [0, 1, 2, 6, 7], [0, 1, 2, 8], [3, 4, 9], [3, 4, 10, 11, 12], [13]],
    [10, 4, 16, 5, 1, 7],
    16,
    [1] * 6,
)


@st.composite
def batches(draw: st.DrawFn, *, max_sequences: int = 8, max_pages: int = 6) -> Batch:
    """Sequences that begin with a part of an earlier one, some of them in an order that is not grouped."""
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    tables: list[list[int]] = []
    fresh = iter(range(10**6))
    for _ in range(draw(st.integers(1, max_sequences))):
        model = draw(st.sampled_from([*tables, []]))
        shared = model[: draw(st.integers(0, len(model)))]
        own = [next(fresh) for _ in range(draw(st.integers(0 if shared else 1, max_pages)))]
        tables.append(shared + own)
    tables = draw(st.permutations(tables))
    last = [draw(st.integers(1, page_size)) for _ in tables]
    batch = batch_of(tables, last, page_size, [1] * len(tables))
    if draw(st.booleans()):
        return batch
    return batch._replace(query_lens=[draw(st.integers(1, n)) for n in batch.num_tokens])


# -- the forest, from its definition -----------------------------------------------------------------------------------


class SlowRun(NamedTuple):
    """The pages [begin, end) that exactly these sequences (numbers in the batch) have in common."""

    members: frozenset[int]
    begin: int
    end: int


def slow_runs(batch: Batch) -> list[SlowRun]:
    """Every maximal run: leading pages grouped by who has them as shareable pages."""
    sharers: dict[tuple[int, ...], set[int]] = {}
    for i, (table, limit) in enumerate(zip(batch.tables, batch.limits, strict=True)):
        for end in range(1, limit + 1):
            sharers.setdefault(tuple(table[:end].tolist()), set()).add(i)
    ends: dict[frozenset[int], list[int]] = {}
    for prefix, members in sharers.items():
        if len(members) > 1:
            ends.setdefault(frozenset(members), []).append(len(prefix))
    return [SlowRun(members, min(lens) - 1, max(lens)) for members, lens in ends.items()]


def slow_order(runs: Sequence[SlowRun], members: frozenset[int]) -> list[int]:
    """Depth-first order: branches by their first sequence; one in no smaller run is a branch of its own."""
    inner = [run.members for run in runs if run.members < members]
    branches = [run for run in inner if not any(run < other for other in inner)]
    alone = [frozenset({i}) for i in members if not any(i in branch for branch in branches)]
    order: list[int] = []
    for branch in sorted([*branches, *alone], key=min):
        order += [*branch] if len(branch) == 1 else slow_order(runs, branch)
    return order


class SlowLevel(NamedTuple):
    """A level as lists: rows and pages of each group."""

    rows: list[int]
    pages: list[list[int]]


def slow_levels(batch: Batch, runs: Sequence[SlowRun], order: Sequence[int]) -> list[SlowLevel]:
    """Levels with these runs as groups, in this order; pages of runs left out go down to the next group."""
    above = {run.members: [other for other in runs if other.members > run.members] for run in runs}
    num_shared = {i: max((run.end for run in runs if i in run.members), default=0) for i in order}
    levels: list[SlowLevel] = []
    cuts: set[int] = {0, len(order)}
    for depth in range(1 + max((len(supersets) for supersets in above.values()), default=-1)):
        here = {frozenset(run.members): run for run in runs if len(above[run.members]) == depth}
        owner = [next((members for members in here if i in members), None) for i in order]
        cuts |= {i for i in range(1, len(order)) if owner[i] != owner[i - 1]}
        level = SlowLevel([], [])
        bounds = sorted(cuts)
        for first, stop in pairwise(bounds):
            group = owner[first]
            level.rows.append(sum(batch.query_lens[order[i]] for i in range(first, stop)))
            if group is None:
                level.pages.append([])
                continue
            begin = max((run.end for run in above[group]), default=0)
            level.pages.append(batch.tables[order[first]][begin : here[group].end].tolist())
        levels.append(level)
    own = [batch.tables[i][num_shared[i] :].tolist() for i in order]
    return [*levels, SlowLevel([batch.query_lens[i] for i in order], own)]


# -- attention, from its definition ------------------------------------------------------------------------------------


def pack(batch: Batch) -> FlashInferPackedData:
    """The batch packed plainly, from lists."""
    indptr = [0]
    for table in batch.tables:
        indptr.append(indptr[-1] + len(table))
    last = [(n - 1) % batch.page_size + 1 if n else 0 for n in batch.num_tokens]
    return FlashInferPackedData(int32(*(int(p) for table in batch.tables for p in table)), int32(*indptr), int32(*last))


def slot(manager: PagedKVCacheManager, cache: torch.Tensor, page: int, offset: int) -> torch.Tensor:
    """[num_heads, head_dim] of one token slot of a 4-D cache tensor, whatever its layout; a view."""
    return cache[page, offset] if manager.kv_layout == "NHD" else cache[page, :, offset]


def fill(manager: PagedKVCacheManager, batch: Batch, seed: int) -> None:
    """Random keys and values in every slot that the batch uses, NaN in all others."""
    generator = torch.Generator().manual_seed(seed)
    used = {
        (int(table[token // batch.page_size]), token % batch.page_size)
        for table, n in zip(batch.tables, batch.num_tokens, strict=True)
        for token in range(n)
    }
    for layer in range(manager.num_layers):
        for cache in manager.layer_tensors(layer):
            cache.copy_(torch.full(cache.shape, math.nan))
            for page, offset in sorted(used):
                target = slot(manager, cache, page, offset)
                target.copy_(torch.randn(target.shape, generator=generator))


class Attention(NamedTuple):
    """What attention gives: out float64 [rows, heads, head_dim] and base-2 lse float64 [rows, heads]."""

    out: torch.Tensor
    lse: torch.Tensor


def dense_attention(
    manager: PagedKVCacheManager,
    batch: Batch,
    q: torch.Tensor,
    *,
    layer: int = 0,
    causal: bool = True,
    sm_scale: float | None = None,
    soft_cap: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores,
) -> Attention:
    """Row by row and head by head, in float64, over keys and values gathered slot by slot."""
    key_cache, value_cache = manager.layer_tensors(layer)
    scale = manager.head_dim**-0.5 if sm_scale is None else sm_scale
    heads_each = q.shape[1] // manager.num_heads
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    row = 0
    for table, num_tokens, num_rows in zip(batch.tables, batch.num_tokens, batch.query_lens, strict=True):
        where = [(int(table[t // batch.page_size]), t % batch.page_size) for t in range(num_tokens)]
        for i in range(num_rows):
            seen = where[: num_tokens - num_rows + 1 + i] if causal else where
            for head in range(q.shape[1] if seen else 0):
                keys, values = (
                    torch.stack([slot(manager, cache, *place)[head // heads_each].double() for place in seen])
                    for cache in (key_cache, value_cache)
                )
                scores = soft_cap(keys @ q[row, head].double() * scale)
                out[row, head] = torch.softmax(scores, 0) @ values
                lse[row, head] = torch.logsumexp(scores, 0) / math.log(2)
            row += 1
    return Attention(out, lse)
