"""When sharing pays: the predicted time of a batch's levels, and the runs worth a level; numpy only.

Reading a prefix once for many sequences saves memory traffic, and costs one more kernel and one more merge for each
level. What a group of query rows spends on each token it reads is the larger of matrix work and reading:

    first   max(rows * flops / flop rate, bytes / memory rate)     the page is read by this group alone
    again   max(rows * flops / flop rate, bytes / reread rate)     another group of the batch has read it too

A page that several groups read comes from memory once, which costs bytes / memory rate - bytes / reread rate, and from
the L2 cache afterwards. Each level above the last adds `level_overhead_us`.

    a prefix of 16000 tokens, 8 sequences of one row each, the defaults of `CostModel`
    plain    8 * 16000 * again(1 row) + 16000 * (975 - 418) ps     53.5 + 8.9 µs
    shared   16000 * first(8 rows, computed as 16)                 15.6 µs, and 25 µs for the level: pays

The best choice by these costs is found exactly (`seqattn.run_costs`).

Kernels are not that simple: work comes in waves, and calls share the device. A model with a `Device` takes whole depths
of the forest and, where its runs differ, the best choice for each number of levels by the costs above, and lets the
device's own figures decide between them. It remembers what it chose: the next steps of a batch come to the same, and so
does a batch that has the same runs with nearly as many sequences each, as when one has joined or left.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field

from seqattn.alike import AlikeRuns, AlikeSteps
from seqattn.chosen import Chosen, what_matters
from seqattn.device import Device, Heads, not_negative, positive_rate
from seqattn.forest import Run
from seqattn.groups import RunArrays, cut_of
from seqattn.run_costs import MOST_DEPTHS, RunChoice, RunCosts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    BoolArray = npt.NDArray[np.bool_]
    FloatArray = npt.NDArray[np.float64]
    Int64Array = npt.NDArray[np.int64]

__all__ = ["CostModel", "runs_that_pay"]

#: shared levels at most, where a device decides
_MOST_LEVELS = 3
#: depths of a forest whose runs are alike that are weighed one by one
_MOST_ALIKE = 2
#: what a device has chosen is kept for so many batches
_MOST_CHOSEN = 256


@define(slots=True, frozen=True)
class CostModel:
    """What a step of attention costs on one device for one model.

    The defaults are fitted to attention times of an H200 (bfloat16, 32 query heads, 8 KV heads, head_dim 128, page 16,
    decode): see `tests/seqattn/test_cost.py` for the measured batches and forests, and how near the model comes.

    Attributes:
        kv_bytes_per_token: bytes of one token's keys and values in one layer: 2 * KV heads * head_dim * element size.
        flops_per_row: operations of one query row on one token: 4 * query heads * head_dim.
        heads_per_kv_head: query heads that share a KV head; a kernel computes their rows together, in tiles of 16, 64
            or 128, so that few rows cost as much as a full tile.
        bytes_per_s: rate of reading memory; 4.2e12 is what the fastest kernels reach of the H200's 4.8e12.
        reread_bytes_per_s: rate of reading what another sequence of the same kernel has just read: the slope of plain
            decode over the length of a shared prefix.
        flops_per_s: rate of the matrix work of a shared level: the slope of a shared level over the same.
        level_overhead_us: what one level above the last adds, in microseconds: a launch, its ramp and tail, a merge.
        launch_us: what a step costs before it reads anything, in microseconds.
        device: what decides between numbers of levels; None to decide by the attributes above.
        heads: the model's heads, for the device.

    Raises:
        BadValueError: a number that is negative, not finite, or zero where it divides.
    """

    kv_bytes_per_token: float = field(default=4096.0, validator=positive_rate)
    flops_per_row: float = field(default=16384.0, validator=not_negative)
    heads_per_kv_head: float = field(default=4.0, validator=positive_rate)
    bytes_per_s: float = field(default=4.2e12, validator=positive_rate)
    reread_bytes_per_s: float = field(default=9.8e12, validator=positive_rate)
    flops_per_s: float = field(default=3e14, validator=positive_rate)
    level_overhead_us: float = field(default=25.0, validator=not_negative)
    launch_us: float = field(default=9.0, validator=not_negative)
    device: Device | None = None
    heads: Heads = Heads()  # noqa: RUF009  frozen

    @classmethod
    def for_heads(
        cls,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        element_size: int,
        *,
        device: Device | None = None,
    ) -> CostModel:
        """A model of these sizes (`element_size` in bytes) on a device; None for an H200."""
        device = Device() if device is None else device
        heads = Heads(num_qo_heads, num_kv_heads, head_dim, element_size)
        return cls(
            heads.token_bytes,
            4 * num_qo_heads * head_dim,
            num_qo_heads / num_kv_heads,
            bytes_per_s=device.decode.bytes_per_s,
            reread_bytes_per_s=max(device.decode.reread_bytes_per_s, device.decode.bytes_per_s),
            flops_per_s=4 * 128 * 128 * device.num_processors / max(device.fa3.token_ns, 1e-3) * 1e9,
            level_overhead_us=device.level_us,
            launch_us=device.plain_us,
            device=device,
            heads=heads,
        )

    @property
    def memory_us(self) -> float:
        """Microseconds to read one token's keys and values from memory."""
        return self.kv_bytes_per_token / self.bytes_per_s * 1e6

    @property
    def reread_us(self) -> float:
        """Microseconds to read them again."""
        return self.kv_bytes_per_token / self.reread_bytes_per_s * 1e6

    def first_us(self, rows: npt.NDArray[np.integer]) -> FloatArray:
        """Microseconds a token for groups of `rows` rows that read it alone; element-wise."""
        return np.maximum(self.work_us(rows), self.memory_us)

    def again_us(self, rows: npt.NDArray[np.integer]) -> FloatArray:
        """Microseconds a token for groups of `rows` rows that read it after others; element-wise."""
        return np.maximum(self.work_us(rows), self.reread_us)

    def work_us(self, rows: npt.NDArray[np.integer]) -> FloatArray:
        """Microseconds of matrix work a token for groups of `rows` rows; element-wise."""
        packed = rows * self.heads_per_kv_head
        tile = np.where(packed <= 16, 16, np.where(packed <= 64, 64, 128))
        computed: FloatArray = np.ceil(packed / tile) * tile / self.heads_per_kv_head
        return computed * (self.flops_per_row / self.flops_per_s * 1e6)


def runs_that_pay(
    runs: Sequence[Run], rows_before: Int64Array, num_tokens: Int64Array, page_size: int, model: CostModel
) -> list[bool]:
    """Which runs to keep as groups of levels above the last, so that the predicted time is least; the fewest on a tie.

    A page of a run that another sequence holds past its shareable pages counts as that sequence's own: this is the same
    for every choice, but for the few microseconds by which one of them may read it again.

    Args:
        runs: the forest, each run behind the one above it; those of one sequence are long lists (`seqattn.long_lists`).
        rows_before: query rows before each position of the order, int64 [batch + 1].
        num_tokens: tokens of the sequence at each position of the order, int64 [batch].
        page_size: tokens in a page.
        model: what things cost.

    Cost: some two hundred numpy calls, and O(runs * depth * levels) numbers; with a device a third of that for runs
    that are alike (`seqattn.alike`), and a lookup for a batch like one that it has seen before.
    """
    if not runs:
        return []
    if model.device is None:
        costs = RunCosts(RunArrays(runs, rows_before), rows_before, page_size, model)
        num_levels = _num_levels(costs, model)
        return RunChoice(costs, num_levels).best(model.level_overhead_us) if num_levels else [False] * len(runs)
    memory = model.device.chosen
    alike = AlikeRuns.of(runs, len(num_tokens), _MOST_ALIKE)
    key = what_matters(runs, alike, rows_before, num_tokens, page_size), page_size, model.heads
    known = memory.get(key)
    if known is not None:
        return known.kept(runs)
    kept = _fastest(runs, alike, rows_before, num_tokens, page_size, model, model.device)
    if len(memory) >= _MOST_CHOSEN:
        memory.clear()
    memory[key] = Chosen.from_kept(runs, kept)
    return kept


def _num_levels(costs: RunCosts, model: CostModel) -> int:
    """How many levels above the last may pay."""
    if not (most_saved := costs.most_saved()) > 0:
        return 0
    num_levels = 1 + int(costs.runs.depth.max())
    return min(num_levels, int(most_saved / model.level_overhead_us)) if model.level_overhead_us > 0 else num_levels


def _fastest(
    runs: Sequence[Run],
    alike: AlikeRuns | None,
    rows_before: Int64Array,
    num_tokens: Int64Array,
    page_size: int,
    model: CostModel,
    device: Device,
) -> list[bool]:
    """The runs to keep by the device's own figures."""
    rows = rows_before[1:] - rows_before[:-1]
    if alike is not None and (rows == rows[0]).all():
        choices = _depth_sets(len(alike.counts))
        steps = AlikeSteps(device, model.heads, alike, num_tokens, int(rows[0]), page_size=page_size)
        best = choices[steps.best(choices)]
        return [depth in best for depth in alike.depths]
    arrays = RunArrays(runs, rows_before)
    costs = RunCosts(arrays, rows_before, page_size, model)
    alone = arrays.size == 1
    if not alone.any() and not costs.most_saved() > 0:
        return [False] * len(runs)
    masks = _masks(costs, min(len(arrays.members), _MOST_LEVELS), alone)
    cut, num_shared = cut_of(arrays, masks, num_tokens, rows, page_size=page_size)
    kept: list[bool] = masks[device.choose(cut, num_shared, model.heads)].tolist()
    return kept


@cache
def _depth_sets(num_depths: int) -> list[tuple[int, ...]]:
    """Depths that may be kept as a whole, none the first and fewer before more."""
    most = min(num_depths, _MOST_LEVELS)
    return [kept for size in range(most + 1) for kept in combinations(range(min(num_depths, MOST_DEPTHS)), size)]


def _masks(costs: RunCosts, num_levels: int, alone: BoolArray) -> BoolArray:
    """Choices of runs that a device compares, none the first; [choices, runs].

    Depths as a whole, of the first few; and the best by costs for each number of levels, without runs of one sequence:
    whether these are kept makes no difference to costs.
    """
    sets = _depth_sets(len(costs.runs.members))
    depths = np.zeros((len(sets), len(costs.runs.members)), dtype=bool)
    for mask, kept in zip(depths, sets, strict=True):
        mask[list(kept)] = True
    masks = depths[:, costs.runs.depth]
    if not alone.all():
        masks = np.concatenate((masks, RunChoice(costs, num_levels).best_of_each() & ~alone))
    first_of = {mask.tobytes(): i for i, mask in reversed(list(enumerate(masks)))}
    return masks[sorted(first_of.values())]
