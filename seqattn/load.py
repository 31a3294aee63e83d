"""What a call of an attention kernel has to do, counted before it runs; numpy only.

A call computes groups: rows of queries over a list of tokens. With `num_qo_heads / num_kv_heads` query heads on one KV
head a group has that many packed rows for each row. A kernel cuts them into tiles and computes a tile of one KV head
over a stretch of tokens as one block:

    fa3              tiles of 128 packed rows, one block a multiprocessor; the caller cuts lists of tokens, into slices
    fa2 and decode   tiles of 16, 64 or 128 by the mean of packed rows, two blocks a multiprocessor; cuts lists itself
                     until blocks fill them
    short            decode without tensor cores, for short lists: it begins a list in half the time
    fa3_in_line      fa3 over tokens that lie side by side, where its stretches are long

All levels of all choices are counted at once: a `Cut` lists their groups one after the other, those of shared levels
before those of last levels.

    choice 0, level 0   groups 0 1        first 0
    choice 1, level 0   groups 2 3 4      first 2
    choice 0, last      groups 5 6 7 8    first 5
    choice 1, last      groups 9 ... 12   first 9
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from attrs import define

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Int64Array = npt.NDArray[np.int64]
    FloatArray = npt.NDArray[np.float64]

__all__ = [
    "FA3",
    "FA3_IN_LINE",
    "LEAST_CHUNK",
    "LEAST_SLICE",
    "LONG_GROUPS",
    "MOST_SHORT",
    "SHORT",
    "SLICES",
    "TILE_LIST",
    "Cut",
    "Groups",
    "Heads",
    "Load",
    "is_long",
    "is_short",
    "loads_of",
    "slices_for",
]

#: kernels by number: the three tiles of fa2, the first of which is decode, then these
FA3, SHORT, FA3_IN_LINE = 3, 4, 5
#: query heads of a KV head and their elements for which the kernel for short lists was measured, and the fewest lists
_SHORT_HEADS, _SHORT_DIM, _LEAST_LISTS = 4, 128, 8
#: tokens of the longest list that it is for: where its blocks do not fill the device, where they do, and where they do
#: several times over, so that it cuts no list; there only if lists are nearly alike, since the longest is waited for
_SHORT_FEW, _SHORT_SOME, MOST_SHORT = 80, 128, 176
TILE_LIST = (16, 64, 128)
_TILES = np.array(TILE_LIST)
#: numbers of slices to choose from
SLICES = np.array([1, 2, 4, 8, 16, 32])
#: that many were measured, and that many for one KV head with as many tiles
_MOST_SLICES, _SLICES_OF_FEW = 8, 64
#: fa2 cuts no list of tokens shorter than this
LEAST_CHUNK = 128
#: nor do slices
LEAST_SLICE = 64
#: in a CUDA graph long lists (`seqattn.long_lists`) are padded to the next multiple of so many, by one at least
LONG_GROUPS = 4
#: tokens of a slice from which on fa3 is faster over an array than over a list of pages; shorter ones take longer
_LEAST_IN_LINE = 512


@define(slots=True, frozen=True)
class Heads:
    """A model's heads: query heads, KV heads, elements of a head, and bytes of an element."""

    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    element_size: int = 2

    @property
    def heads_each(self) -> int:
        """Query heads that share a KV head."""
        return max(1, self.num_qo_heads // self.num_kv_heads)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.element_size


@define(slots=True, frozen=True, eq=False)
class Groups:
    """The groups of one level.

    Attributes:
        rows: query rows of each, int64.
        tokens: tokens that each reads, int64, above 0.
        num_different: different tokens among them all.
        in_line: there is one group, and its tokens lie side by side in memory.
    """

    rows: Int64Array
    tokens: Int64Array
    num_different: int
    in_line: bool = False


@define(slots=True, frozen=True, eq=False)
class Cut:
    """The groups of many levels; drawn at the top of this file.

    Attributes:
        rows, tokens: of each group, int64.
        times: how many groups there are of each such, int64.
        first: where each level's groups begin, int64 [levels]; no level is empty.
        different: different tokens of each level, int64 [levels].
        num_shared: of the levels, those that are not a choice's last.
        in_line: as in `Groups`, bool [levels]; None for none that is known to be.
    """

    rows: Int64Array
    tokens: Int64Array
    times: Int64Array
    first: Int64Array
    different: Int64Array
    num_shared: int
    in_line: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, levels: Sequence[Groups]) -> Cut:
        """The levels of one choice, coarsest first, the last level included."""
        first = np.cumsum([0, *(len(level.rows) for level in levels[:-1])])
        different = np.array([level.num_different for level in levels])
        rows = np.concatenate([level.rows for level in levels])
        tokens = np.concatenate([level.tokens for level in levels])
        in_line = np.array([level.in_line for level in levels])
        return cls(rows, tokens, np.ones_like(rows), first, different, len(levels) - 1, in_line)


@define(slots=True, frozen=True, eq=False)
class Load:
    """What calls do.

    Attributes:
        kernel: its number; an array of any shape, such as [levels, ways].
        values: for each number below an array of that shape, float64 [9, ...].

    The numbers:
        blocks of a tile over a stretch of tokens; tokens of all blocks; tokens of the longest;
        rows of partial results that the kernel merges itself, and rows that these belong to;
        rows of results that are merged with those of other levels; query rows that are laid out anew for it;
        bytes read from memory, and bytes read again.
    """

    kernel: npt.NDArray[np.intp]
    values: FloatArray


def is_short(heads: Heads, num_processors: int, num_lists: int, longest: int, num_tokens: int) -> bool:
    """Whether lists with a query row each are for the kernel for short lists.

    Args:
        heads: the model's.
        num_processors: the device's multiprocessors.
        num_lists: how many.
        longest: tokens of the longest.
        num_tokens: tokens of all.
    """
    if (heads.heads_each, heads.head_dim) != (_SHORT_HEADS, _SHORT_DIM) or num_lists < _LEAST_LISTS:
        return False
    blocks = num_lists * heads.num_kv_heads
    if blocks <= num_processors * 3 // 2:
        return longest <= _SHORT_FEW
    if longest <= _SHORT_SOME:
        return True
    return blocks > 5 * num_processors and longest <= MOST_SHORT and 4 * longest * num_lists <= 5 * num_tokens


def is_long(num_tokens: int) -> bool:
    """Whether fa3 reads slices of so many tokens, the longest of a call, faster as an array than page by page."""
    return num_tokens >= _LEAST_IN_LINE


def slices_for(heads: Heads, slices: Int64Array) -> Int64Array:
    """Those of the numbers of slices that were seen to be good with so many KV heads: 8, more with fewer than 8 heads.

    More slices fill the device better by count, and are slower in fact: fa2, which cuts lists too, is there for them.
    """
    return slices[: np.searchsorted(slices, max(_SLICES_OF_FEW // heads.num_kv_heads, _MOST_SLICES), side="right")]


def loads_of(
    cut: Cut, heads: Heads, num_processors: int, slices: Int64Array, *, has_short: bool = True
) -> tuple[Load, npt.NDArray[np.bool_]]:
    """What each level does by fa2 (or decode), and by fa3 in each number of slices; O(groups * slices).

    Args:
        cut: the levels.
        heads: the model's.
        num_processors: the device's multiprocessors.
        slices: numbers of slices.
        has_short: short lists have their own kernel.

    Returns:
        The loads, [levels, 1 + slices], and which of them make sense: no slice is too short, no last level is sliced.
    """
    begins = cut.first.tolist()
    level = np.arange(len(begins)).repeat([b - a for a, b in pairwise((*begins, len(cut.rows)))])
    longest = np.maximum.reduceat(cut.tokens, cut.first)
    sums = np.array((cut.times, cut.rows * cut.times, cut.tokens * cut.times))
    counts, total_rows, total_tokens = np.add.reduceat(sums, cut.first, axis=1)
    values = np.zeros((9, len(counts), 1 + len(slices)))
    values[0] = values[2] = 1  # blocks of what is not counted, and their tokens
    kernel = np.full(values.shape[1:], FA3)
    if cut.in_line is not None and cut.in_line.any():
        kernel[cut.in_line[:, None] & (-(-longest[:, None] // np.r_[1, slices]) >= _LEAST_IN_LINE)] = FA3_IN_LINE
    kernel[:, 0], values[:7, :, 0] = _fa2(
        cut, heads, num_processors, (counts, level, longest, total_rows, total_tokens), has_short=has_short
    )
    if cut.num_shared and len(slices):
        values[:7, : cut.num_shared, 1:] = _fa3(cut, heads, (level, longest), slices)
    values[7:] = np.array((cut.different, total_tokens - cut.different))[..., None] * float(heads.token_bytes)
    makes_sense = np.zeros(values.shape[1:], dtype=bool)
    makes_sense[:, 0] = True
    makes_sense[: cut.num_shared, 1:] = longest[: cut.num_shared, None] >= LEAST_SLICE * slices * (slices > 1)
    return Load(kernel, values), makes_sense


def _fa2(
    cut: Cut, heads: Heads, num_processors: int, sums: tuple[Int64Array, ...], *, has_short: bool
) -> tuple[Int64Array, tuple[Int64Array, ...]]:
    """Kernel and the first seven numbers of each level."""
    counts, level, longest, total_rows, total_tokens = sums
    packed = cut.rows * heads.heads_each
    mean = total_rows * heads.heads_each // counts
    kernel = (mean > 16).astype(np.intp) + (mean > 64)
    tiles = -(-packed // _TILES[kernel][level]) * cut.times
    num_tiles, work = np.add.reduceat(np.array((tiles, tiles * cut.tokens)), cut.first, axis=1)
    room = max(1, 2 * num_processors // heads.num_kv_heads)  # tiles at a time for each KV head
    # Either is long enough for all chunks to run at once.
    by_list = -(-longest // np.maximum(1, room // num_tiles))
    by_work = np.where(room > num_tiles, -(-work // np.maximum(1, room - num_tiles)), longest)
    chunk = np.maximum(LEAST_CHUNK, np.minimum(by_list, by_work))
    chunks = -(-cut.tokens // chunk[level])
    blocks, parts = np.add.reduceat(np.array((tiles, cut.rows * cut.times)) * chunks, cut.first, axis=1)
    split = longest > chunk
    if has_short and heads.heads_each == _SHORT_HEADS:
        for i in np.flatnonzero((total_rows == counts) & (longest <= MOST_SHORT)).tolist():
            if is_short(heads, num_processors, counts.item(i), longest.item(i), total_tokens.item(i)):
                kernel[i] = SHORT
    num_heads = heads.num_kv_heads
    numbers = blocks * num_heads, work * num_heads, np.minimum(chunk, longest), parts * split, total_rows * split
    return kernel, (*numbers, total_rows, 0 * total_rows)


def _fa3(cut: Cut, heads: Heads, sums: tuple[Int64Array, ...], slices: Int64Array) -> FloatArray:
    """The first seven numbers of each shared level for fa3, [7, levels, slices]."""
    level, longest = sums
    count = cut.num_shared
    stop = cut.first[count] if count < len(cut.first) else len(cut.rows)
    rows, tokens, times, first = cut.rows[:stop], cut.tokens[:stop], cut.times[:stop], cut.first[:count]
    tiles = -(-rows * heads.heads_each // 128) * heads.num_kv_heads * times
    most = -(-longest[:count, None] // slices)
    chunks = -(-tokens[:, None] // most[level[:stop]])
    numbers = np.zeros((7, count, len(slices)))
    numbers[0] = np.add.reduceat(tiles[:, None] * chunks, first)
    numbers[1] = np.add.reduceat(tiles * tokens, first)[:, None]
    numbers[2] = most
    numbers[5] = numbers[6] = np.add.reduceat((rows * times)[:, None] * chunks, first)
    return numbers
