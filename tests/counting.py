"""What a call costs, counted instead of timed, so that a busy machine changes nothing: calls, lines and bytes.

    def total(numbers):         total([7, 8, 9])   1 call     its own; one to a function written in C would count, too
        n = 0                                      9 lines    1 + 4 + 3 + 1: a loop's line counts each time round
        for number in numbers:                     no bytes   the most that was allocated at once, numpy's included,
            n += number                                       beyond what there was before
        return n

A loop inside one C function (`min(leaves)`, `array.sum()`) is one call and no line; it shows only if it allocates.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median_low
from types import FrameType
from typing import Any, NamedTuple

__all__ = ["Cost", "assert_flat", "assert_linear", "cost"]


class Cost(NamedTuple):
    """What calls cost: calls and lines of all together, and the bytes of the median one."""

    calls: int
    lines: int
    num_bytes: int


def cost(prepare: Callable[[], Callable[[], object]], times: int = 1) -> Cost:
    """Counts `times` calls of what `prepare` returns; it is asked three times.

    The first is called and not counted: it fills caches and imports what is imported late. The second is counted, the
    third has its memory traced, since counting allocates. To count calls that change what they work on, `prepare` makes
    it anew; or it returns the same function again, where another call more or less does not matter.
    """
    prepare()()
    calls, lines = _count(prepare(), times)
    return Cost(calls, lines, _trace_memory(prepare(), times))


def assert_flat(small: Cost, large: Cost, *, more_bytes: float = 2048) -> None:
    """The larger case costs what the smaller one does, up to a tenth and a little; it may allocate `more_bytes`."""
    assert_linear(small, large, 1, more_bytes=more_bytes)


def assert_linear(small: Cost, large: Cost, factor: float, *, more_bytes: float = 2048) -> None:
    """The larger case costs at most `factor` times what the smaller one does, up to a tenth and a little."""
    factor *= 1.1
    for what, most in (
        ("calls", small.calls * factor + 3),
        ("lines", small.lines * factor + 12),
        ("num_bytes", small.num_bytes * factor + more_bytes),
    ):
        found = getattr(large, what)
        assert found <= most, f"{what} grew to {found}, {most:.0f} is the most: {small} became {large}"


@contextmanager
def _alone() -> Iterator[None]:
    """Without the collector, which runs at odd moments and calls back, and without a tracer of coverage."""
    was_enabled, was_profile, was_trace = gc.isenabled(), sys.getprofile(), sys.gettrace()
    gc.disable()
    sys.setprofile(None)
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(was_trace)
        sys.setprofile(was_profile)
        if was_enabled:
            gc.enable()


def _count(call: Callable[[], object], times: int) -> tuple[int, int]:
    calls = lines = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call" or (event == "c_call" and arg is not sys.setprofile)  # which ends it

    def trace(frame: FrameType, event: str, arg: object) -> Any:  # noqa: ANN401  as sys.settrace has it
        nonlocal lines
        lines += event == "line"
        return trace

    with _alone():
        sys.settrace(trace)
        sys.setprofile(profile)
        try:
            for _ in range(times):
                call()
        finally:
            sys.setprofile(None)
            sys.settrace(None)
    return calls, lines


def _trace_memory(call: Callable[[], object], times: int) -> int:
    """The median, since once in many calls a dictionary grows, which is cheap in the long run."""
    peaks = []
    with _alone():
        tracemalloc.start()
        try:
            for _ in range(times):
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                kept = call()
                peaks.append(tracemalloc.get_traced_memory()[1] - before)
                del kept
        finally:
            tracemalloc.stop()
    return median_low(peaks)
