"""Freeing one page in a cache full of idle leaves of one page each.

    evict       one page, nothing else
    allocation  a request of one page is started: looked up, a page evicted and handed out (vLLM: not its hashing)
    extension   a running request gets a page more, which evicts one
    request     a whole request of one page, from its arrival until its page is cached

After each run the cache is filled again, so every run sees the same number of leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.clock import Sample, group_size, limited, time_groups
from benchmarks.command import TakeSamples, main
from benchmarks.workload import Ids, leaves

OPTIONS = {"leaves": 10_000, "page_size": 16}


def prepare(adapter: Any, *, page_size: int, **sizes: int) -> TakeSamples:  # noqa: ANN401  impls.load
    """Fills the cache."""
    num_leaves = sizes["leaves"]
    cache, prompts = adapter(num_leaves, page_size), leaves(100 * num_leaves, page_size)
    for _ in range(num_leaves):
        cache.put(cache.prompt(next(prompts)))
    assert cache.num_idle_pages == num_leaves, f"{cache.num_idle_pages} idle of {num_leaves}"

    def take() -> dict[str, Sample]:
        samples = _requests(cache, prompts) if hasattr(cache, "allocate_one") else {}
        before = cache.num_idle_pages
        size = group_size(cache.evict_pages, 1)
        times = time_groups(cache.evict_pages, ([1] * size for _ in limited(0.3, least=3, most=100)))
        num_evicted = size * len(times) + 2
        assert before - cache.num_idle_pages == num_evicted, "each call frees one page"
        samples["evict"] = Sample(times, {"calls_in_group": size})
        cache.give_back()
        for _ in range(num_evicted):
            cache.put(cache.prompt(next(prompts)))
        return samples

    return take


def _requests(cache: Any, prompts: Iterator[Ids]) -> dict[str, Sample]:  # noqa: ANN401  an adapter
    """What requests cost that evict one page; afterwards the cache is as full as before."""

    def starting() -> Iterator[list[Any]]:
        for _ in limited(0.15):
            request = cache.new_page(next(prompts))
            yield [request]
            cache.end_one(request)

    def growing() -> Iterator[list[Any]]:
        for _ in limited(0.15):
            request = cache.new_page(next(prompts))
            cache.allocate_one(request)
            yield [cache.new_growth(request, next(prompts))]
            cache.abort_one(request)
            for _ in range(2):
                cache.put(cache.prompt(next(prompts)))

    whole = ([cache.new_request(next(prompts))] for _ in limited(0.15))
    return {
        "allocation": Sample(time_groups(cache.allocate_one, starting())[5:]),
        "extension": Sample(time_groups(cache.extend_one, growing())[5:]),
        "request": Sample(time_groups(cache.request, whole)[5:]),
    }


if __name__ == "__main__":
    main("evict", OPTIONS)
