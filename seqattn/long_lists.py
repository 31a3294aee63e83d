"""Sequences whose own pages take longer than all others': they get a level above the last, where their lists are cut.

A decode kernel gives each list to one block once lists alone fill the device, however long one of them is. Then a step
waits for the longest:

    64 sequences, 8 KV heads, room for 33 lists at a time, in tokens
    as they are       63 lists of 1,000   one of 20,000                                 waits for 20,000
    with a level      level 0  [19,456] alone, cut into as many parts as there is room
                      last     63 lists of 1,000   one of 544                           waits for 1,000

Such a list is a run (`seqattn.forest`) of one sequence. Whether it becomes a group of a level is decided as for every
other run (`seqattn.cost`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from seqattn.cost import runs_that_pay
from seqattn.forest import Run, without
from seqattn.levels import pages_above
from seqattn.load import LONG_GROUPS
from seqattn.one_load import Lists
from seqattn.ways import Ways

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from seqattn.cost import CostModel
    from seqattn.device import Device
    from seqattn.load import Heads

    Int64Array = npt.NDArray[np.int64]

__all__ = ["runs_to_keep", "with_long_lists"]

#: tokens of the shortest list that is cut, and how many lists are at most
_LEAST, _MOST = 256, 31


def runs_to_keep(
    runs: list[Run],
    rows_before: Int64Array,
    num_tokens: Int64Array,
    limits: Int64Array,
    page_size: int,
    model: CostModel | None,
) -> list[Run]:
    """The groups of the levels above the last: shared runs that pay, and long lists where cutting them does.

    Args:
        runs: the forest, each run behind the one above it.
        rows_before: query rows before each position of the order, int64 [batch + 1].
        num_tokens: tokens of the sequence at each position, int64 [batch].
        limits: pages of it that levels above the last may have, int64 [batch].
        page_size: tokens in a page.
        model: what things cost; None keeps every shared run and cuts nothing.

    Returns:
        Runs of a forest: each behind the one above it, pages of those that were dropped with the kept ones below them.

    Cost: that of `runs_that_pay`; where sequences have one query row each some ten numpy calls more, and with long
    lists half a millisecond the first time.
    """
    if model is None:
        return runs
    if model.device is not None and rows_before.item(-1) == len(num_tokens):
        runs = with_long_lists(runs, num_tokens, limits, page_size, model.device, model.heads)
    kept = runs_that_pay(runs, rows_before, num_tokens, page_size, model)
    return runs if all(kept) else without(runs, kept)[0]


def with_long_lists(
    runs: list[Run], num_tokens: Int64Array, limits: Int64Array, page_size: int, device: Device, heads: Heads
) -> list[Run]:
    """The forest, with a run for each sequence that the last level would wait for; arguments as above.

    Long are lists of more than half of the tokens that a block has in the mean, but never all. Of its own pages a run
    has a multiple of a power of two, so that it stays the same for many steps.
    """
    batch = len(num_tokens)
    if not batch:
        return runs
    above = pages_above(runs, batch)
    own = num_tokens - page_size * above
    longest, total = int(own.max()), int(own.sum())
    if longest <= _LEAST or longest * batch == total:
        return runs
    by = Ways(device, heads)
    if by.idle_us(by.fa2(1, Lists(batch, longest, total, own), total)) < device.level_us:
        return runs
    room = max(1, 2 * device.num_processors // heads.num_kv_heads)
    enough = max(total // (2 * room), _LEAST)
    # Padded for a graph they leave room to cut them.
    most = min((room - 1) // LONG_GROUPS * LONG_GROUPS - 1, _MOST, batch - 1)
    long = np.flatnonzero(own > enough)
    if len(long) > most:
        long = np.sort(np.argsort(own, kind="stable")[batch - max(most, 0) :])
    unit = _power_of_two(max(enough // page_size, 1))
    begins = above[long]
    ends = begins + (limits[long] - begins) // unit * unit
    alone = list(zip(long.tolist(), begins.tolist(), ends.tolist(), strict=True))
    return _with_alone(runs, [each for each in alone if each[2] > each[1]])


def _power_of_two(number: int) -> int:
    """The largest that is not above it."""
    return 1 << (number.bit_length() - 1)


def _with_alone(runs: Sequence[Run], alone: list[tuple[int, int, int]]) -> list[Run]:
    """The forest with runs of one sequence, of each its position and where its pages begin and end."""
    places = [(first, stop, begin, end) for first, stop, begin, end, _ in runs]
    places += [(first, first + 1, begin, end) for first, begin, end in alone]
    # In a depth-first order a run stands behind those around it, which begin no later and stop no earlier.
    places.sort(key=lambda place: (place[0], -place[1]))
    found: list[Run] = []
    around: list[int] = []
    for first, stop, begin, end in places:
        while around and found[around[-1]].stop <= first:
            around.pop()
        found.append(Run(first, stop, begin, end, around[-1] if around else None))
        around.append(len(found) - 1)
    return found
