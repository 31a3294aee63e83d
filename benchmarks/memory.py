"""What the books cost: resident memory for each cached leaf, token and page; KV memory is not there.

The figure includes the allocator, and for SGLang the tensors of slot numbers that its tree keeps. Run in a fresh
process: a forked one could reuse what its parent has freed.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from benchmarks.clock import Sample
from benchmarks.command import TakeSamples, main
from benchmarks.workload import leaves as prompts_of

OPTIONS = {"leaves": 100_000, "tokens": 16, "page_size": 16}


def prepare(adapter: Any, *, leaves: int, tokens: int, page_size: int) -> TakeSamples:  # noqa: ANN401  impls.load
    """Lets everything be loaded that is loaded at first use."""

    def build(num_leaves: int) -> Any:  # noqa: ANN401  an adapter
        cache = adapter(num_leaves * -(-tokens // page_size), page_size)
        for prompt in prompts_of(num_leaves, tokens):
            cache.put(cache.prompt(prompt))
        return cache

    kept = build(3)

    def take() -> dict[str, Sample]:
        before = _resident()
        cache = build(leaves)
        used = _resident() - before
        del cache
        num_pages = leaves * -(-tokens // page_size)
        each = {"leaf": leaves, "token": leaves * tokens, "page": num_pages}
        return {f"bytes a {name}": Sample([used / count], {"count": count}, "B") for name, count in each.items()}

    assert kept.num_idle_pages
    return take


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main("memory", OPTIONS)
