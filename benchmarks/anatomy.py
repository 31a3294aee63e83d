"""What our chat turn is made of: the time of each of its calls, and how many calls of functions that is.

The chat of `benchmarks.turn`, each call timed by itself. With `--scale 0.1` all texts are a tenth as long: what is left
is what a turn costs whatever its length. The counts are of one late turn, with a profile function set.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from benchmarks.clock import Sample, no_garbage_collection, now
from benchmarks.command import TakeSamples, main
from benchmarks.workload import chat

OPTIONS = {"page_size": 16, "conversations": 500, "scale": 1.0}
CALLS = ("start", "extend", "finish")


class Counter:
    """Counts calls of Python functions and of C functions, by phase."""

    def __init__(self) -> None:
        self.counts = {name: [0, 0] for name in CALLS}
        self.phase = CALLS[0]

    def __call__(self, _frame: FrameType, event: str, _arg: object) -> None:
        """For `sys.setprofile`."""
        if event in {"call", "c_call"}:
            self.counts[self.phase][event == "c_call"] += 1


def prepare(adapter: Any, *, page_size: int, conversations: int, scale: float) -> TakeSamples:  # noqa: ANN401  impls.load
    """Draws the conversations; each run serves them from an empty cache."""
    work = chat(conversations, scale=scale)

    def take() -> dict[str, Sample]:
        cache = adapter(work.capacity // page_size, page_size)
        times, counter = {name: list[float]() for name in CALLS}, Counter()
        with no_garbage_collection():
            for at, (prompt, reply) in enumerate(work.turns):
                steps = cache.steps_of(prompt, reply)
                if at == len(work.turns) - 1:
                    _count(steps, counter)
                    break
                for name, step in zip(CALLS, steps, strict=True):
                    begin = now()
                    step()
                    times[name].append(now() - begin)
        return {
            name: Sample(times[name], {"python_calls": counter.counts[name][0], "c_calls": counter.counts[name][1]})
            for name in CALLS
        }

    return take


def _count(steps: Any, counter: Counter) -> None:  # noqa: ANN401  functions without arguments
    for counter.phase, step in zip(CALLS, steps, strict=True):
        sys.setprofile(counter)
        step()
        sys.setprofile(None)


if __name__ == "__main__":
    main("anatomy", OPTIONS)
