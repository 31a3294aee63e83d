"""Counters of a prefix cache: hits and misses in tokens, pages shared, forked, evicted and adopted."""

from __future__ import annotations

from attrs import Factory, define, evolve

__all__ = ["CacheStats"]

_BUCKETS = 64


@define(slots=True)
class CacheStats:
    """What a `PrefixCache` has done so far. Plain numbers: read them, or take a `snapshot` to compare later.

    A request that is started again after `abort` (preemption) with a prompt that begins with the aborted one counts
    once, with what it hit the first time.

    Attributes:
        num_requests: sequences started.
        num_query_tokens: tokens of their prompts.
        num_hit_tokens: those of them that were cached.
        num_shared_pages: full pages that starts shared.
        num_forked_pages: partly used pages that were copied: tails of starts and forks, cut pages before they grow.
        num_evicted_pages: pages that eviction freed.
        num_adopted_pages: pages given back because the tree had the same tokens already.
        evicted_ages: evicted pages by age, the logical time between last use and eviction; entry i counts the pages of
            age 2**(i-1) to 2**i - 1, entry 0 those of age 0. What was demoted counts as older than all else.
        evicted_reuses: evicted pages by the number of starts that shared them, in the same buckets.
    """

    num_requests: int = 0
    num_query_tokens: int = 0
    num_hit_tokens: int = 0
    num_shared_pages: int = 0
    num_forked_pages: int = 0
    num_evicted_pages: int = 0
    num_adopted_pages: int = 0
    evicted_ages: list[int] = Factory(lambda: [0] * _BUCKETS)
    evicted_reuses: list[int] = Factory(lambda: [0] * _BUCKETS)

    @property
    def num_miss_tokens(self) -> int:
        """Prompt tokens that had to be computed."""
        return self.num_query_tokens - self.num_hit_tokens

    @property
    def hit_rate(self) -> float:
        """Hit tokens by query tokens; 0 before the first request."""
        return self.num_hit_tokens / self.num_query_tokens if self.num_query_tokens else 0.0

    def snapshot(self) -> CacheStats:
        """A copy that stays as it is."""
        return evolve(self, evicted_ages=self.evicted_ages[:], evicted_reuses=self.evicted_reuses[:])
