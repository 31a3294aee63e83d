"""Taking free pages and giving them back, by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.clock import Sample, group_size, limited, time_groups
from benchmarks.command import TakeSamples, main
from benchmarks.pack import descriptor

OPTIONS = {"pages": 8192}


def prepare(adapter: Any, *, pages: int) -> TakeSamples:  # noqa: ANN401  impls.load
    """Makes a pool twice as large."""
    manager = descriptor(adapter.seqattn, 2 * pages, 16).cache_manager

    def take_and_give(num_pages: int) -> None:
        manager.release_pages(manager.allocate(num_pages))

    def take() -> dict[str, Sample]:
        take_and_give(pages)
        size = group_size(take_and_give, pages)
        times = time_groups(take_and_give, ([pages] * size for _ in limited(0.25)))
        assert manager.available_pages_count == 2 * pages
        return {"allocate and release": Sample(times, {"calls_in_group": size})}

    return take


if __name__ == "__main__":
    main("allocate", OPTIONS)
