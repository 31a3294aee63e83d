"""Replays prompts through a `PrefixCache` over page numbers alone: what would this cache have saved?

    requests ──▶ token ids ──▶ PrefixCache.start ──▶ finish ──▶ … ──▶ PrefixCache.stats ──▶ ReplayReport

One request at a time, prompts only: nothing else runs, and outputs are not inserted. A prompt that is cached whole is a
whole hit (`min_uncached_tokens=0`). With whole pages each prompt is cut to full pages before it starts, so that no page
is ever taken for a tail that could not be kept. A prompt longer than the cache keeps its first pages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import attrs

from radix.cache import PrefixCache
from radix.replay.distinct import count_all_pages, count_full_pages
from radix.replay.report import ReplayReport
from radix.replay.request import Request
from radix.replay.workload import ChatTurn
from seqattn.errors import BadValueError
from seqattn.pages import PageAllocator

__all__ = ["CHECK_EVERY", "POLICIES", "capacity_of", "replay", "replay_chat", "simulate"]

#: orders of eviction that a replay can use.
POLICIES = ("lru",)
#: requests between two `check()`s of the whole state.
CHECK_EVERY = 1_000


def simulate(
    requests: Sequence[Request],
    *,
    page_size: int,
    capacity_pages: int | None = None,
    policy: Literal["lru"] = "lru",
    whole_pages: bool = False,
    on_request: Callable[[], object] | None = None,
) -> ReplayReport:
    """Replays requests through a cache made for them.

    Args:
        requests: the prompts in order.
        page_size: token slots in a page.
        capacity_pages: pages of the cache; None gives it as many as it can ever fill, and reports None.
        policy: one of `POLICIES`.
        whole_pages: share full pages only.
        on_request: called after each request (a progress bar).

    Raises:
        BadValueError: a size below 1, or an unknown policy.
    """
    num_pages = capacity_pages
    if num_pages is None:
        # All that the trace can ever fill, and one more for the fork of a tail whose page the tree has already.
        num_pages = _count_pages(requests, page_size, whole_pages=whole_pages) + 1
    cache = PrefixCache(PageAllocator(num_pages, page_size), policy=policy, whole_pages=whole_pages)
    report = replay(requests, cache, on_request=on_request)
    return attrs.evolve(report, policy=policy, capacity_pages=capacity_pages)


def capacity_of(requests: Iterable[Request], *, page_size: int, fraction: float, whole_pages: bool) -> int:
    """A capacity in pages: this fraction of the distinct pages, rounded half up; partial pages count with tails on.

    Raises:
        BadValueError: a fraction outside (0, 1], or one that leaves no page.
    """
    if not 0.0 < fraction <= 1.0:
        raise BadValueError(f"a capacity of {fraction} of the distinct pages is not in (0, 1]: for more, give pages")
    num_distinct = _count_pages(requests, page_size, whole_pages=whole_pages)
    num_pages = math.floor(fraction * num_distinct + 0.5)
    if not num_pages:
        raise BadValueError(f"{fraction} of {num_distinct} distinct pages is no page: raise the fraction")
    return num_pages


def replay(
    requests: Iterable[Request], cache: PrefixCache, *, on_request: Callable[[], object] | None = None
) -> ReplayReport:
    """Starts and finishes each prompt in a new cache; `check()` every 1,000 requests and at the end.

    Args:
        requests: the prompts in order; read one at a time.
        cache: a cache over a bare `PageAllocator`, through which nothing has gone yet.
        on_request: called after each request (a progress bar).

    Raises:
        BadValueError: the cache was used before.
    """
    run = _Run(cache)
    capacity = cache.manager.num_pages * cache.manager.page_size
    for seq_id, request in enumerate(requests):
        num_tokens = run.count(request.num_tokens)
        if num_tokens:
            cache.start(seq_id, request.token_ids()[: min(num_tokens, capacity)], min_uncached_tokens=0)
            cache.finish(seq_id)
        run.check()
        if on_request is not None:
            on_request()
    return run.report()


def replay_chat(turns: Iterable[ChatTurn], cache: PrefixCache) -> ReplayReport:
    """Starts each prompt in a new cache, appends the reply, finishes both; hits are counted in prompt tokens.

    The last prompt token is always computed (`min_uncached_tokens=1`), as by a model that goes on from it.

    Raises:
        NoPageError: a turn is larger than the whole cache.
        BadValueError: the cache was used before.
    """
    run = _Run(cache)
    for seq_id, turn in enumerate(turns):
        run.count(len(turn.prompt))
        cache.start(seq_id, turn.prompt)
        cache.extend([seq_id], [turn.reply])
        cache.finish(seq_id)
        run.check()
    return run.report()


class _Run:
    """Counts what goes into a cache, and takes what came out of it from the cache's own statistics."""

    def __init__(self, cache: PrefixCache) -> None:
        if cache.stats.num_query_tokens:
            raise BadValueError(f"{cache.stats.num_query_tokens} tokens went through this cache before: use a new one")
        self._cache = cache
        self._page_size = cache.manager.page_size
        self._num_requests = self._num_tokens = self._num_pages = 0
        self._started_at = time.process_time()

    def count(self, num_tokens: int) -> int:
        """Notes a prompt; returns what of it can be kept: all with tails, the full pages without."""
        kept = num_tokens // self._page_size * self._page_size if self._cache.whole_pages else num_tokens
        self._num_requests += 1
        self._num_tokens += num_tokens
        self._num_pages += -(-kept // self._page_size)
        return kept

    def check(self) -> None:
        if self._num_requests % CHECK_EVERY == 0:
            self._cache.check()

    def report(self) -> ReplayReport:
        self._cache.check()
        stats = self._cache.stats
        return ReplayReport(
            requests=self._num_requests,
            input_tokens=self._num_tokens,
            hit_tokens=stats.num_hit_tokens,
            hit_pages=stats.num_shared_pages,
            page_accesses=self._num_pages,
            evicted_pages=stats.num_evicted_pages,
            forked_pages=stats.num_forked_pages,
            capacity_pages=self._cache.manager.num_pages,
            page_size=self._page_size,
            policy=self._cache.policy,
            whole_pages=self._cache.whole_pages,
            cpu_seconds=time.process_time() - self._started_at,
        )


def _count_pages(requests: Iterable[Request], page_size: int, *, whole_pages: bool) -> int:
    return count_full_pages(requests, page_size) if whole_pages else count_all_pages(requests, page_size)
