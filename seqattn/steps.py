"""How long a step of attention takes on a device; numpy only.

A call takes, alone, once it has started (`seqattn.load` counts its blocks):

    computing = blocks a multiprocessor * wave + max(tokens a multiprocessor, late + those of the longest block) * token
    body      = (computing ** mix + reading ** mix) ** (1 / mix)
    call      = body + rows merged of the kernel's own splits

Lists of different lengths leave multiprocessors idle. fa3 hands its blocks out the longest first, so that short ones
fill up what a last round of equal ones would leave. Of decode and fa2 two blocks share a multiprocessor: a long one
that outlasts the others does not go faster for that. They begin head by head, in the order of the lists: `late` is what
is done before the longest list of the last head begins.

`reading` is memory traffic: tokens that no block has read yet come from memory, those read again from the L2 cache.
What is written, merged or laid out row by row takes time by the elements of a row.
A plain step is its one call and a start. Otherwise the calls run at the same time, the coarsest level first:

    work   = sum of (body * share of the multiprocessors that it fills), and all of the last level
    chain  = each call, behind the blocks of others that have its multiprocessors already; at least its longest block
    step   = start + levels * level + gather + max(work, chains) + results merged

Blocks of a last level go wherever there is room, wave after wave: a few that found none may take a wave more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seqattn.load import FA3, FA3_IN_LINE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from seqattn.device import Device
    from seqattn.load import Heads, Load

    FloatArray = npt.NDArray[np.float64]

__all__ = ["ARRAYS", "NUMBERS", "bodies_of", "body_of", "one_by_one", "step_us", "times"]

#: how fast blocks of different lengths come to fill a last round up: the power of their mean over the longest
_FILLED_UP = 4
#: elements of a row of results, or of a query row, for which moving one was measured: 32 heads of 128
_ROW = 32 * 128
#: one number, or an array of them
Value = Any
#: several of them, or an array of all
Values = Any


class Functions(NamedTuple):
    """What formulas use besides operators: numpy's for arrays, Python's for numbers, which are many times faster."""

    ceil: Callable[[Value], Value]
    floor: Callable[[Value], Value]
    maximum: Callable[[Value, Value], Value]
    minimum: Callable[[Value, Value], Value]
    where: Callable[[Value, Value, Value], Value]


ARRAYS = Functions(np.ceil, np.floor, np.maximum, np.minimum, np.where)
NUMBERS = Functions(math.ceil, math.floor, max, min, lambda condition, yes, no: yes if condition else no)


def bodies_of(device: Device, load: Load, heads: Heads) -> FloatArray:
    """What calls take, from what they have to do: `body_of` of each, float64 [14, ...]."""
    is_fa3 = (load.kernel == FA3) | (load.kernel == FA3_IN_LINE)
    return np.array(body_of(device, device.table[:, load.kernel], is_fa3, load.values, heads, ARRAYS))


def body_of(
    device: Device, cost: Values, is_fa3: Value, load: Values, heads: Heads, by: Functions
) -> tuple[Value, ...]:
    """What calls take; times in microseconds.

    Args:
        device: the device.
        cost: the numbers of the kernel, as in `Device.table`.
        is_fa3: whether it is fa3.
        load: the numbers of `Load`.
        heads: the model's.
        by: how to compute.

    The numbers:
        all blocks; merging the kernel's own splits; the share of the multiprocessors that the blocks fill; the blocks
        that run at the same time; how many of these there are, in halves of a multiprocessor; merging results with
        those of other levels and gathering queries; 1 for fa3, else 0; blocks; computing, as if no block were longer
        than others, and reading, each alone, and how they mix; both together; the longest block; the share of the
        call's work, at most 1, that is done before the longest block of the last head begins.
    """
    wave_us, token_ns, rate, again_rate, part_ns, row_ns, mix = cost
    blocks, tokens, longest, parts, split_rows, results, gathered, new, again = load
    token_us = token_ns * (heads.head_dim / 128e3)
    share, mean = blocks / device.num_processors, tokens / blocks
    each = by.ceil(share)
    rounds = by.where(is_fa3, share + (each - share) * (mean / longest) ** _FILLED_UP, each)
    flowing = each * wave_us + rounds * mean * token_us
    # Blocks of the last head begin behind those of the others, but for the first ones.
    late = (1 - is_fa3) * by.maximum(1 - 0.5 / heads.num_kv_heads - 2 * device.num_processors / blocks, 0)
    alone = by.where(is_fa3, 1, by.minimum(each, 2)) * longest + late * rounds * mean
    computing = each * wave_us + by.maximum(rounds * mean, alone) * token_us
    reading = (new / rate + again / again_rate) * 1e6
    body = (computing**mix + reading**mix) ** (1 / mix)
    flow = (flowing**mix + reading**mix) ** (1 / mix)
    row = heads.num_qo_heads * heads.head_dim / _ROW
    post = (parts * part_ns + split_rows * row_ns) * row / 1e3
    filled = blocks / (each * device.num_processors)
    wave = flow / by.where(is_fa3, each, by.ceil(each / 2))
    held = by.minimum(blocks * (1 + is_fa3), 2 * device.num_processors)
    merge = (results * device.result_ns + gathered * device.gathered_ns) * row / 1e3
    chain = wave_us + longest * token_us * (2 - is_fa3)
    return body, post, filled, wave, held, merge, is_fa3, blocks, flowing, reading, mix, flow, chain, late


def one_by_one(call: Sequence[float], then: Sequence[float], level_us: float) -> tuple[float, ...]:
    """Two calls one after the other, as one; each as `body_of` has it."""
    body, post, _, _, _, merge, _, *work, _, flow, chain, _ = (a + b for a, b in zip(call, then, strict=True))
    filled = (call[0] * call[2] + then[0] * then[2]) / body
    held, is_fa3 = max(call[4], then[4]), max(call[6], then[6])
    return body, post, filled, call[3], held, merge + level_us, is_fa3, *work, call[10], flow, chain, call[13]


def times(device: Device, calls: Sequence[Values], by: Functions = ARRAYS) -> Value:
    """Microseconds of steps of at most two shared levels and a last one, coarsest first, each as `body_of` has it."""
    *shared, last = calls
    if not shared:
        return device.plain_us + last[0] + last[1]
    return step_us(device, shared[0], shared[1] if len(shared) > 1 else None, last, by)


def step_us(
    device: Device,
    top: Values,
    lower: Values | None,
    last: Values,
    by: Functions = ARRAYS,
) -> Value:
    """Microseconds of steps of two or three calls that run at the same time; as in `body_of`, shapes broadcast."""
    body, post, _, _, held, merge, is_fa3 = top[:7]
    halves = 2 * device.num_processors
    until, posts, gathers = body, post, is_fa3
    merge = merge + last[5] + (device.start_us + device.level_us)
    before = last[3] * last[2]
    chain: Value = 0.0
    if lower is not None:
        before = before + lower[3] * lower[2]
        # Blocks of fa3 are given to multiprocessors beforehand, whoever else is there.
        behind = lower[0] + (held + lower[4] > halves) * body
        beside = _beside(device, lower, (held, body), device.lower_waits, by)
        chain = beside + lower[6] * device.fa3_waits * by.maximum(behind - beside, 0) + lower[1]
        together = by.minimum(held + lower[4], halves)
        until = (body * held + lower[0] * lower[4]) / together
        held, posts = together, post + lower[1]
        merge, gathers = merge + lower[5] + device.level_us, by.maximum(gathers, lower[6])
    # The last call is launched behind the others.
    alone = _beside(device, last, (held, until), device.last_waits, by) + last[1] + posts + device.last_us
    longest = by.maximum(by.maximum(alone, chain), body + post + (1 - is_fa3) * device.fa2_waits * before)
    return longest + merge + device.gather_us * gathers


def _beside(device: Device, call: Values, others: tuple[Value, Value], waits: float, by: Functions) -> Value:
    """When the blocks of a call are done that find room where others leave it, and everywhere once these are done.

    Where reading is what takes time, fewer blocks at a time are faster each, but read less in all.
    """
    held, until = others
    halves = 2 * device.num_processors
    body, _, _, wave, _, _, _, blocks, computing, reading, mix, flow, longest, late = call
    free, waves = by.maximum(halves - held, 1), flow / wave
    room = free / halves
    slow = ((computing / waves) ** mix + (reading / waves * room**device.spread) ** mix) ** (1 / mix)
    pace = room * wave / slow
    flowing = by.where(until * pace < flow, until * (1 - pace) + flow, flow / pace)
    # The same in whole waves: a few blocks that found no room may take a wave more.
    left = by.maximum(blocks - free * by.floor(until / slow), 0)
    whole = by.minimum(until + by.ceil(left / halves) * wave, by.ceil(blocks / free) * slow)
    # The longest block may be among the last to begin. No faster than alone.
    longest = longest + late * flowing
    return by.maximum(flowing + waits * by.maximum(whole - flowing, 0), by.maximum(longest, body))
