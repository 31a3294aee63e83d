"""What a device's kernels cost, and the fastest way to compute levels by that (`seqattn.steps`); numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field, validators

from seqattn.chosen import Chosen
from seqattn.errors import BadValueError
from seqattn.load import SLICES, Cut, Groups, Heads, loads_of, slices_for
from seqattn.steps import bodies_of
from seqattn.ways import Step, Ways, best_slices

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy.typing as npt
    from attrs import Attribute

    FloatArray = npt.NDArray[np.float64]
    Int64Array = npt.NDArray[np.int64]

__all__ = [
    "Device",
    "Groups",
    "Heads",
    "KernelCost",
    "not_negative",
    "positive_rate",
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


def share(model: object, attribute: Attribute[float], value: float) -> None:
    """A validator of attrs: a number from 0 to 1."""
    not_negative(model, attribute, value)
    if value > 1:
        raise BadValueError(f"{attribute.name} must be a share, from 0 to 1, not {value!r}")


@define(slots=True, frozen=True)
class KernelCost:
    """What a kernel costs; times are for a head_dim of 128.

    Attributes:
        wave_us: a block before its first token.
        token_ns: a tile over one token.
        bytes_per_s: rate of reading from memory.
        reread_bytes_per_s: rate of reading what another block has just read.
        part_ns: a row of the partial results that a split leaves, written and merged; all rows here are those of 32
            query heads of 128 elements, and others take time by their elements.
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
        has_short: whether short lists have their own kernel; in CUDA graphs of steps they have not.
        decode: tiles of 16; of rows that are one for each sequence.
        fa2_64, fa2_128: larger tiles.
        fa3: the other kernel.
        short: decode of short lists.
        fa3_in_line: fa3 over tokens that lie side by side in memory.
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
        level_margin: how much faster each shared level after the first must be predicted to make a step, a share of it.
    """

    num_processors: int = 132
    has_fa3: bool = True
    has_short: bool = field(default=True, validator=validators.instance_of(bool))
    decode: KernelCost = KernelCost(2.906, 6.965, 4.823e12, 14.46e12, 1.98, 190.7, 10.23)  # noqa: RUF009  frozen
    fa2_64: KernelCost = KernelCost(1.018, 13.69, 5.775e12, 226.9e12, 0.5174, 171.2, 3.781)  # noqa: RUF009  as above
    fa2_128: KernelCost = KernelCost(0.1699, 33.79, 4.498e12, 11.23e12, 3.611, 143.7, 4.28)  # noqa: RUF009  as above
    fa3: KernelCost = KernelCost(1.096, 11.87, 18.97e12, 17.82e12, 0.0, 0.0, 0.7001)  # noqa: RUF009  as above
    short: KernelCost = KernelCost(0.001, 4.071, 3.284e12, 4.098e12, 372.2, 170.1, 9.965)  # noqa: RUF009  as above
    fa3_in_line: KernelCost = KernelCost(2.697, 9.094, 8.252e12, 203.6e12, 0.0, 0.0, 1.362)  # noqa: RUF009  as above
    plain_us: float = field(default=5.686, validator=not_negative)
    start_us: float = field(default=0.252, validator=not_negative)
    level_us: float = field(default=7.387, validator=not_negative)
    last_us: float = field(default=3.149, validator=not_negative)
    gather_us: float = field(default=3.559, validator=not_negative)
    fa3_waits: float = field(default=0.6338, validator=not_negative)
    fa2_waits: float = field(default=0.3063, validator=not_negative)
    spread: float = field(default=0.2341, validator=share)
    lower_waits: float = field(default=1.436, validator=not_negative)
    last_waits: float = field(default=0.3712, validator=not_negative)
    result_ns: float = field(default=0.09656, validator=not_negative)
    gathered_ns: float = field(default=14.87, validator=not_negative)
    margin: float = field(default=0.02, validator=not_negative)
    margin_us: float = field(default=0.8, validator=not_negative)
    level_margin: float = field(default=0.015, validator=not_negative)
    #: the kernels' numbers, [7, kernels]; and those of each
    table: FloatArray = field(init=False, eq=False, repr=False)
    columns: list[tuple[float, ...]] = field(init=False, eq=False, repr=False)
    #: choices of runs made lately, by what they were made from
    chosen: dict[Hashable, Chosen] = field(factory=dict, init=False, eq=False, repr=False)

    @table.default
    def _table(self) -> FloatArray:
        return np.array([_numbers(cost) for cost in self.kernels]).T

    @columns.default
    def _columns(self) -> list[tuple[float, ...]]:
        return [_numbers(cost) for cost in self.kernels]

    @property
    def kernels(self) -> tuple[KernelCost, ...]:
        """By their numbers in `seqattn.load`."""
        return self.decode, self.fa2_64, self.fa2_128, self.fa3, self.short, self.fa3_in_line

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
        if last is not None and (found := best_slices(self, heads, shared, last)) is not None:
            return found
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
        by, slices = Ways(self, heads), [0, *slices_for(heads, self.slices).tolist()]
        steps, sensible = self._steps(cut, num_shared, heads)
        found: list[tuple[float, list[int]]] = []
        for step, its in zip(steps, sensible, strict=True):
            us, ways = by.least(step)
            found.append((us, [slices[its[level][way]] for level, way in enumerate(ways)]))
        return found

    def choose(self, cut: Cut, num_shared: Sequence[int], heads: Heads) -> int:
        """The choice to take; the first is plain attention, which others must beat by the margin.

        Args:
            cut: the levels of each choice.
            num_shared: shared levels of each choice.
            heads: the model's.
        """
        return Ways(self, heads).choose(self._steps(cut, num_shared, heads)[0])

    def harder(self, num_shared: int) -> float:
        """What the time of a choice with so many shared levels is multiplied with before it is compared with others."""
        return (1 + self.level_margin) ** max(num_shared - 1, 0)

    def enough_us(self, plain_us: float) -> float:
        """What a choice must be faster than if plain attention takes so long."""
        return (1 - self.margin) * plain_us - self.margin_us

    def _steps(self, cut: Cut, num_shared: Sequence[int], heads: Heads) -> tuple[list[Step], list[list[list[int]]]]:
        """Each choice as a step, and for each of its shared levels which ways make sense: 0 for fa2, then fa3's."""
        slices = slices_for(heads, self.slices)
        load, makes_sense = loads_of(cut, heads, self.num_processors, slices, has_short=self.has_short)
        bodies = np.ascontiguousarray(bodies_of(self, load, heads).transpose(1, 2, 0)).tolist()
        sensible = [[way for way, makes in enumerate(level) if makes] for level in makes_sense.tolist()]
        steps: list[Step] = []
        its: list[list[list[int]]] = []
        begin = 0
        for last, count in zip(bodies[cut.num_shared :], num_shared, strict=True):
            levels = range(begin, begin + count)
            steps.append(Step([[bodies[level][way] for way in sensible[level]] for level in levels], last[0]))
            its.append([sensible[level] for level in levels])
            begin += count
        return steps, its


def _numbers(cost: KernelCost) -> tuple[float, ...]:
    rates = cost.bytes_per_s, cost.reread_bytes_per_s
    return cost.wave_us, cost.token_ns, *rates, cost.part_ns, cost.row_ns, cost.mix
