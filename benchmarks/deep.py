"""A long conversation that is cached: what a request holds when it starts, and lets go when it ends.

Built turn by turn: 100 tokens of the user, 200 of reply. Shapes:

    chat      nothing else was said
    branches  each reply was given twice, so that no cache can keep the conversation in one piece
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.clock import Sample, group_size, limited, time_groups
from benchmarks.command import TakeSamples, main
from benchmarks.workload import ids

OPTIONS = {"turns": 64, "page_size": 16, "shape": "chat"}


def prepare(adapter: Any, *, turns: int, page_size: int, shape: str) -> TakeSamples:  # noqa: ANN401  impls.load
    """Builds the conversation."""
    cache = adapter(turns * (500 // page_size + 4) + 8, page_size)
    said = ids(0, seed=0)
    for turn in range(turns):
        prompt = np.append(said, ids(100, seed=3 * turn))
        if shape == "branches":
            cache.turn(cache.turn_of(prompt, ids(200, seed=3 * turn + 1)))
        reply = ids(200, seed=3 * turn + 2)
        cache.turn(cache.turn_of(prompt, reply))
        said = np.append(prompt, reply)
    query = cache.prompt(np.append(said, 7))

    def take() -> dict[str, Sample]:
        num_found, _ = cache.matched(cache.match(query))
        assert num_found >= len(said) // page_size * page_size, f"{num_found} of {len(said)} tokens found"
        cache.hold_and_release(query)
        size = group_size(cache.hold_and_release, query)
        fresh = ([cache.copy(query) for _ in range(size)] for _ in limited(0.25))
        return {"hold and release": Sample(time_groups(cache.hold_and_release, fresh), {"calls_in_group": size})}

    return take


if __name__ == "__main__":
    main("deep", OPTIONS)
