"""Copying the cached part of a tail page, keys and values of all layers: what a forked tail costs beside bookkeeping.

On the CPU, where the copy is part of the turn; on a GPU it is one kernel that the host does not wait for.
"""

from __future__ import annotations

from typing import Any

from benchmarks.clock import Sample, limited, time_groups
from benchmarks.command import TakeSamples, main

OPTIONS = {"layers": 32, "heads": 8, "head_dim": 128, "page_size": 16, "slots": 8}
PAGES = 64


def prepare(adapter: Any, *, layers: int, heads: int, head_dim: int, page_size: int, slots: int) -> TakeSamples:  # noqa: ANN401
    """Makes KV memory in bfloat16."""
    import torch

    manager = adapter.seqattn.PagedKVCacheManager(
        PAGES, page_size, heads, head_dim, torch.bfloat16, torch.device("cpu"), num_layers=layers
    )
    pages = manager.allocate(PAGES).tolist()

    def copy(at: int) -> None:
        manager.copy_page_slots([pages[at]], [pages[at + 1]], [slots])

    def take() -> dict[str, Sample]:
        copy(0)
        times = time_groups(copy, ([i % (PAGES - 1)] for i in limited(0.3)))
        moved = 2 * 2 * layers * heads * head_dim * slots  # keys and values, two bytes each
        return {"copy": Sample(times, {"bytes": moved})}

    return take


if __name__ == "__main__":
    main("copies", OPTIONS)
