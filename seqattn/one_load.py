"""What one call has to do whose groups are alike, with Python's numbers: as `seqattn.load` counts many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from seqattn.load import LEAST_CHUNK, LEAST_SLICE, SHORT, TILE_LIST, is_short

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from seqattn.load import Heads

    Int64Array = npt.NDArray[np.int64]

__all__ = ["Lists", "fa3_load", "makes_sense", "one_fa2_load"]


class Lists(NamedTuple):
    """The lists of tokens that a call reads.

    Attributes:
        num_lists: how many.
        longest: tokens of the longest.
        total: tokens of all.
        tokens: of each, int64; None where all are alike.
    """

    num_lists: int
    longest: int
    total: int
    tokens: Int64Array | None = None

    def num_chunks(self, chunk: int) -> int:
        """How many chunks of at most so many tokens they are cut into."""
        if self.longest <= chunk:
            return self.num_lists
        if self.tokens is None:
            return self.num_lists * -(-self.longest // chunk)
        return int((-(-self.tokens // chunk)).sum())


def one_fa2_load(
    heads: Heads, num_processors: int, rows: int, lists: Lists, different: int, *, has_short: bool = True
) -> tuple[int, tuple[float, ...]]:
    """Kernel and numbers of one call by fa2 (or decode), as `loads_of` has them, of groups of as many rows each.

    Args:
        heads: the model's.
        num_processors: the device's multiprocessors.
        rows: of each group.
        lists: of the groups.
        different: different tokens among them all.
        has_short: short lists have their own kernel.
    """
    count, longest, total = lists[:3]
    packed = rows * heads.heads_each
    kernel = (packed > 16) + (packed > 64)
    tiles = -(-packed // TILE_LIST[kernel])
    room = max(1, 2 * num_processors // heads.num_kv_heads)
    by_list = -(-longest // max(1, room // (tiles * count)))
    by_work = -(-tiles * total // max(1, room - tiles * count)) if room > tiles * count else longest
    chunk = max(LEAST_CHUNK, min(by_list, by_work))
    num_chunks = lists.num_chunks(chunk)
    if has_short and rows == 1 and is_short(heads, num_processors, count, longest, total):
        kernel = SHORT
    split, num_heads = longest > chunk, heads.num_kv_heads
    parts = (rows * num_chunks, rows * count) if split else (0, 0)
    calls = (tiles * num_chunks * num_heads, tiles * total * num_heads, min(chunk, longest), *parts)
    return kernel, (*calls, rows * count, 0, *_traffic(heads, total, different))


def fa3_load(heads: Heads, rows: int, tokens: int, different: int, slices: int, *, times: int) -> tuple[float, ...]:
    """The numbers of one call by fa3, as `loads_of` has them, of groups that are all alike, in slices."""
    tiles = -(-rows * heads.heads_each // 128) * heads.num_kv_heads * times
    most = -(-tokens // slices)
    chunks = -(-tokens // most)
    results = rows * chunks * times
    return (tiles * chunks, tiles * tokens, most, 0, 0, results, results, *_traffic(heads, times * tokens, different))


def makes_sense(tokens: int, slices: int) -> bool:
    """Whether no slice is too short."""
    return slices == 1 or tokens >= LEAST_SLICE * slices


def _traffic(heads: Heads, total: int, different: int) -> tuple[float, float]:
    token_bytes = float(heads.token_bytes)
    return different * token_bytes, (total - different) * token_bytes
