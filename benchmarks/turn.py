"""A whole chat turn: what a request costs from its arrival until its pages are cached.

500 conversations of 8 turns over one system prompt, 64 at a time, in a cache that holds 30 % of all their tokens:
prompts of 1,100 to 3,200 tokens of which 95 % are cached, replies of 200 tokens in one piece. Prompts and replies are
given in the form that the implementation's own scheduler has. KV memory is not there: what copying a tail costs is
measured by `copies`.

    turn        everything, the handing out of pages or slots included
    turn, tree  SGLang only: without handing out slots and taking them back
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.clock import Sample, time_groups
from benchmarks.command import TakeSamples, main
from benchmarks.workload import chat

OPTIONS = {"page_size": 16, "conversations": 500, "turns": 8, "live": 64}


def prepare(adapter: Any, *, page_size: int, conversations: int, turns: int, live: int) -> TakeSamples:  # noqa: ANN401
    """Draws the conversations; each run serves them from an empty cache."""
    work = chat(conversations, turns, live)

    def serve(cache: Any, slots_ns: list[int]) -> list[float]:  # noqa: ANN401  an adapter
        def each() -> Iterator[list[Any]]:
            for prompt, reply in work.turns:
                slots_ns.append(getattr(cache, "slots_ns", 0))
                yield [cache.turn_of(prompt, reply)]
            slots_ns.append(getattr(cache, "slots_ns", 0))

        return time_groups(cache.turn, each())

    def take() -> dict[str, Sample]:
        cache = adapter(work.capacity // page_size, page_size)
        times = serve(cache, [])
        samples = {"turn": Sample(times, cache.turn_facts())}
        if hasattr(cache, "time_slots"):
            cache, passed = adapter(work.capacity // page_size, page_size), list[int]()
            cache.time_slots()
            times = serve(cache, passed)
            apart = [
                all_ns - (after - before) for all_ns, before, after in zip(times, passed, passed[1:], strict=False)
            ]
            samples["turn, tree"] = Sample(apart, cache.turn_facts())
        return samples

    return take


if __name__ == "__main__":
    main("turn", OPTIONS)
