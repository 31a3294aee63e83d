"""Which kernel computes a level, and in how many slices; numpy only.

fa3 computes tiles of 128 rows, one after the other on each multiprocessor, and one tile reads one list of pages. A
level with few tiles leaves multiprocessors idle, so its lists are sliced until the tiles fill them:

    132 multiprocessors, 8 KV heads, 64 sequences with 4 query heads for each KV head, one shared prefix
    tiles    2 of 128 rows for each KV head: 16
    slices   8: 128 tiles, each over an eighth of the prefix
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from seqattn.attention.calls import Choice

if TYPE_CHECKING:
    from seqattn.attention.plan import BatchPlan, LevelPlan
    from seqattn.cache import PagedKVCacheManager

__all__ = ["choose"]

_TILE_ROWS = 128
_MOST_SLICES = 32
#: pages of a slice hold at least this many tokens
_LEAST_TOKENS = 64
#: what a tile costs before its first token, in tokens
_TILE_TOKENS = 256
#: mean rows of a group from which on the causal level is faster in tiles of 128 rows
_LONG_ROWS = 64


class _Backend(Protocol):
    manager: PagedKVCacheManager
    heads_each: int
    num_processors: int
    has_fa3: bool


def choose(plan: BatchPlan, backend: _Backend) -> list[Choice]:
    """A choice for each level of a batch."""
    shared = [_shared(level, backend) for level in plan.levels[:-1]]
    last = plan.levels[-1]
    lens = np.diff(last.qo_indptr)
    if len(lens) and lens.min() == lens.max() == 1:
        return [*shared, Choice("decode")]
    is_long = backend.has_fa3 and int(lens.sum()) >= _LONG_ROWS * len(lens)
    return [*shared, Choice("fa3" if is_long else "fa2")]


def _shared(level: LevelPlan, backend: _Backend) -> Choice:
    if not backend.has_fa3:
        return Choice("fa2")
    rows = np.diff(level.qo_indptr)
    used = (rows > 0) & (level.kv_lens > 0)
    if not used.any():
        return Choice("fa2")
    tiles = -(-rows[used] * backend.heads_each // _TILE_ROWS) * backend.manager.num_heads
    tokens = level.kv_lens[used]
    longest = int(tokens.max())
    slices = np.arange(1, max(1, min(_MOST_SLICES, longest // _LEAST_TOKENS)) + 1)
    length = -(-longest // slices)  # tokens of a slice
    items = (tiles * -(-tokens // length[:, None])).sum(axis=1)
    rounds = -(-items // backend.num_processors)
    cost = rounds * (length + _TILE_TOKENS)
    return Choice("fa3", int(slices[cost.argmin()]))
