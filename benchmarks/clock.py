"""Timing: CPU time of this thread, garbage collection off, groups of calls between two readings of the clock.

Reading the clock costs 0.1 to 0.3 µs, so calls that take microseconds are timed in groups. What a group is made of is
made just before it, outside the timed stretch: a prompt that arrives was written a moment ago.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Sample", "group_size", "limited", "microseconds", "no_garbage_collection", "now", "time_groups"]

#: nanoseconds of CPU time of this thread: what other processes do on the same core is not counted
now = time.thread_time_ns


class Sample(NamedTuple):
    """What one run found out about one operation.

    Attributes:
        values: one number for each timed group: nanoseconds a call, or bytes for `unit="B"`.
        facts: what else is worth a look, such as the hit rate.
        unit: "ns" or "B".
    """

    values: Sequence[float]
    facts: dict[str, float] = {}  # noqa: RUF012  a default that nobody writes
    unit: str = "ns"


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collects once, then not again inside the block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_groups(operation: Callable[[Any], object], groups: Iterable[Sequence[Any]]) -> list[float]:
    """Nanoseconds of CPU time per call of `operation`, one number for each group.

    Args:
        operation: called with each item of a group.
        groups: an iterator that makes the next group when it is asked for it, which is not timed.
    """
    found = []
    with no_garbage_collection():
        for group in groups:
            begin = now()
            for item in group:
                operation(item)
            found.append((now() - begin) / len(group))
    return found


def limited(seconds: float, *, least: int = 5, most: int = 300) -> Iterator[int]:
    """Counts from 0 while CPU time is left: at least `least` groups, at most `most`."""
    end = now() + seconds * 1e9
    for at in range(most):
        if at >= least and now() > end:
            return
        yield at


def group_size(operation: Callable[[Any], object], item: object, *, most: int = 16) -> int:
    """How many calls to time together, so that the clock is below 1 % of what is timed; calls `operation` twice."""
    operation(item)
    begin = now()
    operation(item)
    return int(min(most, max(1, 30_000 // max(now() - begin, 1))))


def microseconds(nanoseconds: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile and mean, in microseconds."""
    values = np.asarray(nanoseconds, dtype=np.float64) / 1e3
    return {
        "median": float(np.median(values)),
        "p10": float(np.percentile(values, 10)),
        "p90": float(np.percentile(values, 90)),
        "mean": float(values.mean()),
    }
