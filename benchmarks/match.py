"""Looking up a prompt that is cached as a whole, with the page numbers (SGLang: slot numbers) of what matches.

The prompt asked for is one token longer than what is cached, as a prompt that a model goes on from is. 1,000 other
prompts are cached. Shapes of the cached prompt:

    one       in one piece
    chunks    in chunks of 4,096 tokens, as chunked prefill adds them
    branches  with another continuation after every 4,096 tokens, so that no cache can keep it in one piece
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.clock import Sample, group_size, limited, time_groups
from benchmarks.command import TakeSamples, main
from benchmarks.workload import Ids, ids, leaves

OPTIONS = {"tokens": 1024, "page_size": 16, "shape": "one", "others": 1000}
CHUNK = 4096
OTHER = 64


def prepare(adapter: Any, *, tokens: int, page_size: int, shape: str, others: int) -> TakeSamples:  # noqa: ANN401  impls.load
    """Fills a cache."""
    num_spare = 2 + (tokens // CHUNK + 1) * (OTHER // page_size + 1)
    cache = adapter(tokens // page_size + others * (OTHER // page_size + 1) + num_spare, page_size)
    for other in leaves(others, OTHER):
        cache.put(cache.prompt(other))
    cached = ids(tokens, seed=1)
    fill(cache, cached, shape)
    query = cache.prompt(np.append(cached, 7))

    def take() -> dict[str, Sample]:
        found = cache.matched(cache.match(query))
        assert found[0] == tokens, f"{found[0]} of {tokens} tokens found"
        assert found[1] in {tokens, tokens // page_size}, found
        size = group_size(cache.match, query)
        fresh = ([cache.copy(query) for _ in range(size)] for _ in limited(0.25))
        return {"match": Sample(time_groups(cache.match, fresh), {"calls_in_group": size})}

    return take


def fill(cache: Any, cached: Ids, shape: str) -> None:  # noqa: ANN401  an adapter
    """Caches one prompt in the given shape."""
    if shape == "one":
        cache.put(cache.prompt(cached))
    elif shape == "chunks":
        cache.put_in_chunks(cache.prompt(cached), CHUNK)
    else:
        for end in range(CHUNK, len(cached), CHUNK):
            cache.put(cache.prompt(np.append(cached[:end], ids(OTHER, seed=end))))
        cache.put(cache.prompt(cached))


if __name__ == "__main__":
    main("match", OPTIONS)
