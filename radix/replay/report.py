"""What a replay found: counts, the rates that follow from them, and how they are written."""

from __future__ import annotations

from typing import Any

import attrs

__all__ = ["ReplayReport"]


@attrs.frozen(kw_only=True)
class ReplayReport:
    """Counts of one replay; hits, shared, forked and evicted pages come from the cache's own statistics.

    Attributes:
        requests: prompts replayed, also those too short to hold a full page.
        input_tokens: tokens of all prompts, uncut.
        hit_tokens: tokens that were found in the cache.
        hit_pages: whole pages that were found and shared; a tail copied into a page of its own is in `forked_pages`.
        page_accesses: pages of all prompts, uncut: full pages only if `whole_pages`.
        evicted_pages: pages freed to make room.
        forked_pages: partly matched pages that were copied.
        capacity_pages: pages of the cache; None if it was unbounded.
        page_size: token slots in a page.
        policy: the order of eviction.
        whole_pages: whether prompts were cut to full pages.
        cpu_seconds: CPU time of this process from the first `start` to the last `check`, both included.
    """

    requests: int
    input_tokens: int
    hit_tokens: int
    hit_pages: int
    page_accesses: int
    evicted_pages: int
    forked_pages: int
    capacity_pages: int | None
    page_size: int
    policy: str
    whole_pages: bool
    cpu_seconds: float

    @property
    def token_hit_rate(self) -> float:
        """Share of all prompt tokens that were found; 0 without prompts."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0

    @property
    def page_hit_rate(self) -> float:
        """Share of all pages that were found and shared whole; 0 without pages."""
        return self.hit_pages / self.page_accesses if self.page_accesses else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Every count and rate by name, in the order in which `--json` prints them."""
        fields = attrs.asdict(self)
        rates = {"token_hit_rate": self.token_hit_rate, "page_hit_rate": self.page_hit_rate}
        first = ("requests", "input_tokens", "hit_tokens", "hit_pages", "page_accesses")
        return {name: fields.pop(name) for name in first} | rates | fields
