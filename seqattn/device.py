"""How long a step of attention takes on a device; numpy only.

A call takes, alone, once it has started (`seqattn.load` counts its blocks):

    computing = blocks a multiprocessor * wave + max(tokens a multiprocessor, tokens of the longest block) * token
    body      = (computing ** mix + reading ** mix) ** (1 / mix)
    call      = body + rows merged of the kernel's own splits

`reading` is memory traffic: tokens that no block has read yet come from memory, those read again from the L2 cache.
A plain step is its one call and a start. Otherwise the calls run at the same time, the coarsest level first:

    work   = sum of (body * share of the multiprocessors that it fills), and all of the last level
    chain  = each call, behind the blocks of others that have its multiprocessors already
    step   = start + levels * level + gather + max(work, chains) + results merged

Blocks of a last level go wherever there is room, wave after wave: a few that found none may take a wave more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field

from seqattn.errors import BadValueError
from seqattn.load import FA3, SLICES, Cut, Groups, Heads, Load, loads_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from attrs import Attribute

    FloatArray = npt.NDArray[np.float64]
    Int64Array = npt.NDArray[np.int64]

__all__ = [
    "Device",
    "Groups",
    "Heads",
    "KernelCost",
    "bodies_of",
    "not_negative",
    "positive_rate",
    "step_us",
]


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
        wave_us: a block before its first token.
        token_ns: a tile over one token.
        bytes_per_s: rate of reading from memory.
        reread_bytes_per_s: rate of reading what another block has just read.
        part_ns: a row of the partial results that a split leaves, written and merged.
        row_ns: a row that they belong to.
        mix: how computing and reading go together: 1 adds them, more comes near the larger of the two.
    """

    wave_us: float = field(validator=not_negative)
    token_ns: float = field(validator=not_negative)
    bytes_per_s: float = field(validator=positive_rate)
    reread_bytes_per_s: float = field(validator=positive_rate)
    part_ns: float = field(default=0.0, validator=not_negative)
    row_ns: float = field(default=0.0, validator=not_negative)
    mix: float = field(default=2.0, validator=positive_rate)


@define(slots=True, frozen=True)
class Device:
    """A device's kernels.

    The defaults are fitted to an H200 with flashinfer 0.7.2; `seqattn.calibrate` finds those of another device.

    Attributes:
        num_processors: multiprocessors.
        has_fa3: whether it runs fa3.
        decode: tiles of 16; of rows that are one for each sequence.
        fa2_64, fa2_128: larger tiles.
        fa3: the other kernel.
        short: decode of short lists.
        plain_us: a plain step's launch, with its ramp and tail.
        start_us: the same of a step of levels.
        level_us: what each shared level adds.
        gather_us: what queries that are laid out anew add, for fa3.
        fa2_waits: how much of the other levels' waves a first level in fa2 waits for.
        fa3_waits: how much a lower level in fa3 waits for a first one that has its multiprocessors.
        lower_waits, last_waits: how much of the time counts that a lower shared level, or the last, takes more for
            whole waves.
        result_ns: a row of results merged over levels.
        gathered_ns: a query row laid out anew.
        margin, margin_us: how much faster than plain attention levels must be predicted to be: a share of it, and
            microseconds.
    """

    num_processors: int = 132
    has_fa3: bool = True
    decode: KernelCost = KernelCost(2.287, 6.727, 4.701e12, 47.46e12, 11.19, 55.7, 2.629)  # noqa: RUF009  frozen
    fa2_64: KernelCost = KernelCost(2.015, 11.48, 8.84e12, 17.46e12, 2.901, 67.75, 1.268)  # noqa: RUF009  as above
    fa2_128: KernelCost = KernelCost(0.5815, 23.66, 4.603e12, 22.58e12, 5.719, 64.9, 3.611)  # noqa: RUF009  as above
    fa3: KernelCost = KernelCost(2.296, 13.54, 10.85e12, 60.12e12, 0.0, 0.0, 1.348)  # noqa: RUF009  as above
    short: KernelCost = KernelCost(0.2608, 13.57, 3.021e12, 100e12, 20.8, 180.1, 11.44)  # noqa: RUF009  as above
    plain_us: float = field(default=8.06, validator=not_negative)
    start_us: float = field(default=6.64, validator=not_negative)
    level_us: float = field(default=6.13, validator=not_negative)
    gather_us: float = field(default=4.632, validator=not_negative)
    fa3_waits: float = field(default=0.85, validator=not_negative)
    fa2_waits: float = field(default=0.3717, validator=not_negative)
    lower_waits: float = field(default=0.8289, validator=not_negative)
    last_waits: float = field(default=0.6881, validator=not_negative)
    result_ns: float = field(default=1.244, validator=not_negative)
    gathered_ns: float = field(default=5.084, validator=not_negative)
    margin: float = field(default=0.01, validator=not_negative)
    margin_us: float = field(default=0.2, validator=not_negative)
    #: choices of runs made lately, by what they were made from
    chosen: dict[bytes, list[bool]] = field(factory=dict, init=False, eq=False, repr=False)

    @property
    def kernels(self) -> tuple[KernelCost, ...]:
        """By their numbers in `seqattn.load`."""
        return self.decode, self.fa2_64, self.fa2_128, self.fa3, self.short

    @property
    def slices(self) -> Int64Array:
        """Numbers of slices for fa3; none without it."""
        return SLICES if self.has_fa3 else SLICES[:0]

    def best(self, shared: Sequence[Groups], heads: Heads, last: Groups | None = None) -> tuple[float, list[int]]:
        """The least time of a step over these shared levels, coarsest first, and the slices of each: 0 for fa2.

        Args:
            shared: the levels above the last.
            heads: the model's.
            last: the last level; None leaves its time out.
        """
        if not shared:
            return 0.0 if last is None else self.times(Cut.of([last]), [0], heads)[0], []
        if last is None:  # next to nothing, for each row of the batch
            rows = np.ones(int(shared[-1].rows.sum()), dtype=np.int64)
            last = Groups(rows, rows, len(rows))
        return self.ways(Cut.of([*shared, last]), [len(shared)], heads)[0]

    def step_us(self, levels: Sequence[Groups], heads: Heads) -> float:
        """The least time of a step, the last level in decode or fa2."""
        return self.times(Cut.of(levels), [len(levels) - 1], heads)[0]

    def times(self, cut: Cut, num_shared: Sequence[int], heads: Heads) -> list[float]:
        """The least time of each choice."""
        return [us for us, _ in self.ways(cut, num_shared, heads)]

    def ways(self, cut: Cut, num_shared: Sequence[int], heads: Heads) -> list[tuple[float, list[int]]]:
        """The least time of each choice, and the slices of its shared levels: 0 for fa2.

        Args:
            cut: the levels of each choice, coarsest first, its last level included, as `Cut` has them.
            num_shared: shared levels of each choice.
            heads: the model's.
        """
        load, makes_sense = loads_of(cut, heads, self.num_processors, self.slices)
        bodies = bodies_of(self, load, heads)
        firsts = (np.cumsum(num_shared) - num_shared).tolist()
        found: list[tuple[float, list[int]]] = [(np.inf, [])] * len(num_shared)
        for count in set(num_shared):
            choices = [i for i, shared in enumerate(num_shared) if shared == count]
            levels = np.array([firsts[i] for i in choices])
            last = bodies[:, [cut.num_shared + i for i in choices], 0]
            for i, best in zip(choices, self._best_ways((bodies, last), makes_sense, levels, count), strict=True):
                found[i] = best
        return found

    def _best_ways(
        self,
        calls: tuple[FloatArray, FloatArray],
        makes_sense: npt.NDArray[np.bool_],
        levels: Int64Array,
        count: int,
    ) -> list[tuple[float, list[int]]]:
        """The least times of choices of as many shared levels, which begin at `levels`; their last calls are apart."""
        bodies, last = calls
        if count == 0:
            return [(us, []) for us in (self.plain_us + last[0] + last[1]).tolist()]
        ways = [0, *self.slices.tolist()]
        if count == 1:
            us = step_us(self, bodies[:, levels], None, last[..., None])
            us[~makes_sense[levels]] = np.inf
            return [(us[i, way], [ways[way]]) for i, way in enumerate(us.argmin(axis=1).tolist())]
        second, rest = bodies[:, levels + 1], np.zeros((len(levels), 0), dtype=np.intp)
        for below in range(2, count):  # by the times of each alone
            alone = np.where(makes_sense, bodies[0] + bodies[1], np.inf)[levels + below].argmin(axis=1)
            second = _one_by_one(second, bodies[:, levels + below, alone][..., None])
            rest = np.column_stack((rest, alone))
        us = step_us(self, bodies[:, levels][..., None], second[:, :, None], last[..., None, None])
        us += self.level_us * (count - 2)
        us[~(makes_sense[levels][..., None] & makes_sense[levels + 1][:, None])] = np.inf
        best = us.reshape(len(us), -1).argmin(axis=1)
        found = []
        for i, (way, other) in enumerate(zip(*(part.tolist() for part in divmod(best, len(ways))), strict=True)):
            found.append((us[i, way, other], [ways[n] for n in (way, other, *rest[i].tolist())]))
        return found


def bodies_of(device: Device, load: Load, heads: Heads) -> FloatArray:
    """What calls take, from what they have to do; times in microseconds, float64 [11, ...].

    The numbers:
        all blocks; merging the kernel's own splits; the share of the multiprocessors that the blocks fill; the blocks
        that run at the same time; how many of these there are, in halves of a multiprocessor; merging results with
        those of other levels and gathering queries; 1 for fa3, else 0; blocks; computing and reading
        alone, and how they mix.
    """
    table = np.array([_numbers(cost) for cost in device.kernels]).T
    wave_us, token_ns, rate, again_rate, part_ns, row_ns, mix = table[:, load.kernel]
    blocks, tokens, longest, parts, split_rows, results, gathered, new, again = load.values
    each = np.ceil(blocks / device.num_processors)
    computing = each * wave_us + np.maximum(each * tokens / blocks, longest) * token_ns * (heads.head_dim / 128e3)
    reading = (new / rate + again / again_rate) * 1e6
    is_fa3 = load.kernel == FA3
    bodies = np.empty((11, *blocks.shape))
    bodies[0] = (computing**mix + reading**mix) ** (1 / mix)
    bodies[1] = (parts * part_ns + split_rows * row_ns) / 1e3
    bodies[2] = blocks / (each * device.num_processors)
    bodies[3] = bodies[0] / np.where(is_fa3, each, np.ceil(each / 2))
    bodies[4] = np.minimum(blocks * (1 + is_fa3), 2 * device.num_processors)
    bodies[5] = (results * device.result_ns + gathered * device.gathered_ns) / 1e3
    bodies[6] = is_fa3
    bodies[7:] = blocks, computing, reading, mix
    return bodies


def _one_by_one(call: FloatArray, then: FloatArray) -> FloatArray:
    """Two calls one after the other, as one."""
    both = call + then
    both[2] = (call[0] * call[2] + then[0] * then[2]) / both[0]
    both[3], both[4], both[6] = call[3], np.maximum(call[4], then[4]), np.maximum(call[6], then[6])
    return both


def step_us(device: Device, top: FloatArray, lower: FloatArray | None, last: FloatArray) -> FloatArray:
    """Microseconds of steps of two or three calls that run at the same time; as in `bodies_of`, shapes broadcast."""
    body, post, _, _, held, merge, is_fa3 = top[:7]
    halves = 2 * device.num_processors
    until, posts, gathers = body, post, is_fa3
    merge = merge + last[5] + (device.start_us + device.level_us)
    before = last[3] * last[2]
    chain: FloatArray | float = 0.0
    if lower is not None:
        before = before + lower[3] * lower[2]
        # Blocks of fa3 are given to multiprocessors beforehand, whoever else is there.
        behind = lower[0] + (held + lower[4] > halves) * body
        beside = _beside(lower, (held, body), halves, device.lower_waits)
        chain = beside + lower[6] * device.fa3_waits * np.maximum(behind - beside, 0) + lower[1]
        together = np.minimum(held + lower[4], halves)
        until = (body * held + lower[0] * lower[4]) / together
        held, posts = together, post + lower[1]
        merge, gathers = merge + lower[5] + device.level_us, np.maximum(gathers, lower[6])
    alone = _beside(last, (held, until), halves, device.last_waits) + last[1] + posts
    longest = np.maximum(np.maximum(alone, chain), body + post + (1 - is_fa3) * device.fa2_waits * before)
    us: FloatArray = longest + merge + device.gather_us * gathers
    return us


def _beside(call: FloatArray, others: tuple[FloatArray, FloatArray], halves: int, waits: float) -> FloatArray:
    """When the blocks of a call are done that find room where others leave it, and everywhere once these are done.

    Where reading is what takes time, fewer blocks at a time are faster each.
    """
    held, until = others
    body, _, _, wave, _, _, _, blocks, computing, reading, mix = call
    free, waves = np.maximum(halves - held, 1), body / wave
    slow = ((computing / waves) ** mix + (reading / waves * free / halves) ** mix) ** (1 / mix)
    pace = free / halves * wave / slow
    flowing = np.where(until * pace < body, until * (1 - pace) + body, body / pace)
    # The same in whole waves: a few blocks that found no room may take a wave more.
    left = np.maximum(blocks - free * np.floor(until / slow), 0)
    whole = np.minimum(until + np.ceil(left / halves) * wave, np.ceil(blocks / free) * slow)
    done: FloatArray = flowing + waits * np.maximum(whole - flowing, 0)
    return done


def _numbers(cost: KernelCost) -> tuple[float, ...]:
    rates = cost.bytes_per_s, cost.reread_bytes_per_s
    return cost.wave_us, cost.token_ns, *rates, cost.part_ns, cost.row_ns, cost.mix
