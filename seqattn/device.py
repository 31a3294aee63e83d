"""How long a call of an attention kernel takes on a device; numpy only.

A call computes groups: rows of queries over a list of tokens. With `num_qo_heads / num_kv_heads` query heads on one KV
head a group has that many packed rows for each row. A kernel cuts them into tiles and computes a tile of one KV head
over a stretch of tokens as one block:

    fa3              tiles of 128 packed rows, a block a multiprocessor; the caller cuts lists of tokens, into slices
    fa2 and decode   tiles of 16, 64 or 128 by the mean of packed rows, two blocks a multiprocessor; cuts lists itself
                     until blocks fill them

    time = max(waves * (wave + tokens of a block * token), reading) + split rows * part

`reading` is memory traffic: tokens that no block has read yet come from memory, those read again from the L2 cache.
Tiles of 16 have too little work in flight to read while they compute: there the two add up.

A step's calls follow one another, but that a first level in fa3 that does not fill the device shares it with the fa3
calls that follow, on the other stream:

    step = start + levels * level + all calls - overlap * (what the first call leaves idle, at most the others' time)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field

from seqattn.errors import BadValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from attrs import Attribute

    Int64Array = npt.NDArray[np.int64]

__all__ = ["SLICES", "Device", "Groups", "Heads", "KernelCost", "LevelCost", "not_negative", "positive_rate"]

#: numbers of slices to choose from; between powers of two, blocks fill the device badly
SLICES = np.array([1, 2, 4, 8, 16, 32])
#: fa2 cuts no list of tokens shorter than this
_LEAST_CHUNK = 128


def not_negative(_model: object, attribute: Attribute[float], value: float) -> None:
    """A validator of attrs: a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise BadValueError(f"{attribute.name} must be a finite number of at least 0, not {value!r}")


def positive_rate(model: object, attribute: Attribute[float], value: float) -> None:
    """A validator of attrs: a finite number above 0."""
    not_negative(model, attribute, value)
    if value == 0:
        raise BadValueError(f"{attribute.name} must be above 0: it divides")


@define(slots=True, frozen=True)
class KernelCost:
    """What a kernel costs; times are for a head_dim of 128.

    Attributes:
        wave_us: what blocks that run at the same time cost before their first token.
        token_ns: a tile over one token.
        bytes_per_s: rate of reading from memory.
        reread_bytes_per_s: rate of reading what another block has just read.
        part_ns: a row of the partial results that a split leaves, written and merged.
    """

    wave_us: float = field(validator=not_negative)
    token_ns: float = field(validator=not_negative)
    bytes_per_s: float = field(validator=positive_rate)
    reread_bytes_per_s: float = field(validator=positive_rate)
    part_ns: float = field(validator=not_negative)


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
    """

    rows: Int64Array
    tokens: Int64Array
    num_different: int


@define(slots=True, frozen=True)
class LevelCost:
    """A way to compute a level.

    Attributes:
        us: microseconds, without the start.
        slices: of the longest list of tokens for fa3; 0 for fa2.
        fill: how much of the device its blocks fill, at most 1.
    """

    us: float
    slices: int
    fill: float


@define(slots=True, frozen=True)
class Device:
    """A device's kernels.

    The defaults are fitted to an H200 with flashinfer 0.7.2; `tests/seqattn/test_device.py` says how near they come.

    Attributes:
        num_processors: multiprocessors.
        has_fa3: whether it runs fa3.
        decode: tiles of 16; of rows that are one for each sequence.
        fa2_64, fa2_128: larger tiles.
        fa3: the other kernel.
        start_us: a step's launch, with its ramp and tail.
        level_us: what each shared level adds beside its call: gathered queries, a part to merge, the next start.
        slice_us: what each slice after the first adds, for 100 rows.
        overlap: share of what a first level leaves idle that the others use.
        margin, margin_us: how much faster than plain attention levels must be predicted to be: a share of it, and
            microseconds.
    """

    num_processors: int = 132
    has_fa3: bool = True
    decode: KernelCost = KernelCost(4.07, 3.63, 5.23e12, 13.9e12, 33.0)  # noqa: RUF009  frozen
    fa2_64: KernelCost = KernelCost(0.09, 1.07, 3.65e12, 6.12e12, 19.9)  # noqa: RUF009  as above
    fa2_128: KernelCost = KernelCost(3.26, 46.9, 4.86e12, 5.6e12, 11.7)  # noqa: RUF009  as above
    fa3: KernelCost = KernelCost(0.0, 12.87, 3.55e12, 4.21e12, 0.0)  # noqa: RUF009  as above
    start_us: float = field(default=5.6, validator=not_negative)
    level_us: float = field(default=8.5, validator=not_negative)
    slice_us: float = field(default=0.8, validator=not_negative)
    overlap: float = field(default=0.5, validator=not_negative)
    margin: float = field(default=0.025, validator=not_negative)
    margin_us: float = field(default=3.0, validator=not_negative)

    def fa3_costs(self, groups: Groups, heads: Heads) -> list[LevelCost]:
        """What fa3 costs, for each number of slices that leaves none too short."""
        slices = SLICES[: max(1, int(np.searchsorted(SLICES, int(groups.tokens.max()) // 64, side="right")))]
        tiles = -(-groups.rows * heads.heads_each // 128) * heads.num_kv_heads
        length = -(-int(groups.tokens.max()) // slices)
        blocks = (tiles * -(-groups.tokens // length[:, None])).sum(axis=1)
        waves = -(-blocks // self.num_processors)
        mean = float(tiles @ groups.tokens) / blocks
        compute = np.maximum(waves * mean, length) * (self.fa3.token_ns * heads.head_dim / 128e3)
        compute += waves * self.fa3.wave_us
        us = np.maximum(compute, self._reading_us(self.fa3, groups, heads))
        us += (slices - 1) * (self.slice_us * float(groups.rows.sum()) / 100)
        fill = np.minimum(1.0, blocks / self.num_processors)
        return [LevelCost(*way) for way in zip(us.tolist(), slices.tolist(), fill.tolist(), strict=True)]

    def fa2_cost(self, groups: Groups, heads: Heads) -> LevelCost:
        """What fa2 costs, or decode."""
        packed = groups.rows * heads.heads_each
        mean = float(packed.mean())
        tile, cost = (16, self.decode) if mean <= 16 else (64, self.fa2_64) if mean <= 64 else (128, self.fa2_128)
        tiles = -(-packed // tile)
        room = max(1, 2 * self.num_processors // heads.num_kv_heads)  # tiles at a time for each KV head
        longest = int(groups.tokens.max())
        chunk = max(_LEAST_CHUNK, -(-longest // max(1, room // int(tiles.sum()))))
        chunks = -(-groups.tokens // chunk)
        blocks = int(tiles @ chunks)
        waves = -(-blocks // room)
        length = max(waves * float(tiles @ groups.tokens) / blocks, min(chunk, longest))
        compute = waves * cost.wave_us + length * cost.token_ns * heads.head_dim / 128e3
        reading = self._reading_us(cost, groups, heads)
        us = compute + reading if tile == 16 else max(compute, reading)
        if int(chunks.max()) > 1:
            us += float(groups.rows @ chunks) * cost.part_ns / 1e3
        return LevelCost(us, 0, min(1.0, blocks / room))

    def best(self, shared: Sequence[Groups], heads: Heads) -> tuple[float, list[int]]:
        """The least time of shared levels, coarsest first, and the slices of each: 0 for fa2.

        Only the first level's choice depends on another's.
        """
        if not shared:
            return 0.0, []
        ways = [[self.fa2_cost(level, heads), *self._fa3_costs(level, heads)] for level in shared]
        lower = [min(costs, key=_us) for costs in ways[1:]]
        best = (min(ways[0], key=_us), lower)
        least = best[0].us + sum(map(_us, lower))
        if lower and len(ways[1]) > 1:  # the second level in fa3 may share the device with the first
            beside = [min(ways[1][1:], key=_us), *lower[1:]]
            others = sum(map(_us, beside))
            for first in ways[0][1:]:
                us = first.us + others - self.overlap * min(first.us * (1 - first.fill), others)
                if us < least:
                    least, best = us, (first, beside)
        return least, [way.slices for way in (best[0], *best[1])]

    def step_us(self, levels: Sequence[Groups], heads: Heads) -> float:
        """The least time of a step, the last level in decode or fa2."""
        shared, _ = self.best(levels[:-1], heads)
        return self.start_us + (len(levels) - 1) * self.level_us + shared + self.fa2_cost(levels[-1], heads).us

    def _fa3_costs(self, groups: Groups, heads: Heads) -> list[LevelCost]:
        return self.fa3_costs(groups, heads) if self.has_fa3 else []

    def _reading_us(self, cost: KernelCost, groups: Groups, heads: Heads) -> float:
        again = int(groups.tokens.sum()) - groups.num_different
        seconds = groups.num_different / cost.bytes_per_s + again / cost.reread_bytes_per_s
        return seconds * heads.token_bytes * 1e6


def _us(way: LevelCost) -> float:
    return way.us
