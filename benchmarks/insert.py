"""Caching a prompt of which nothing is cached: in the tree alone, and as a whole request without a reply.

    insert   the tree alone: tokens and the numbers of their pages (SGLang: slots) are given
    request  look up, allocate, insert, let go

1,000 other prompts are cached. Nothing is evicted.
"""

from __future__ import annotations

from typing import Any

from benchmarks.clock import Sample, limited, time_groups
from benchmarks.command import TakeSamples, main
from benchmarks.workload import ids, leaves

OPTIONS = {"tokens": 1024, "page_size": 16, "others": 1000}
OTHER = 64
MOST = 100


def prepare(adapter: Any, *, tokens: int, page_size: int, others: int) -> TakeSamples:  # noqa: ANN401  impls.load
    """Remembers the sizes: each run fills a cache of its own."""

    def filled() -> Any:  # noqa: ANN401  an adapter
        cache = adapter((MOST + 5) * (tokens // page_size + 1) + others * (OTHER // page_size + 1), page_size)
        for other in leaves(others, OTHER):
            cache.put(cache.prompt(other))
        return cache

    def take() -> dict[str, Sample]:
        samples = {}
        cache = filled()
        if hasattr(cache, "insert"):
            num_pages, first = tokens // page_size, others * (OTHER // page_size + 1)
            entries = ([cache.new_entry(ids(tokens, seed=i), first + i * num_pages)] for i in limited(0.2, most=MOST))
            samples["insert"] = Sample(time_groups(cache.insert, entries)[2:])
            cache = filled()
        requests = ([cache.new_request(ids(tokens, seed=i))] for i in limited(0.2, most=MOST))
        samples["request"] = Sample(time_groups(cache.request, requests)[2:])
        return samples

    return take


if __name__ == "__main__":
    main("insert", OPTIONS)
