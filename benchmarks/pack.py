"""Packing the page tables of a batch into flat tensors, once a step.

pack                 all tables, in an order that changes with each call: nothing can be kept from the last one
concatenate          ours only: one np.concatenate of the same tables in the same order, for comparison
again, same tables   after a step in which no sequence needed a page
again, tables grown  after a step in which one sequence of 16 (at page size 16) got a page
step                 the same, the step included
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.clock import Sample, limited, time_groups
from benchmarks.command import TakeSamples, main

OPTIONS = {"batch": 256, "pages": 2048, "page_size": 16}
MOST_STEPS = 150


def descriptor(package: Any, num_pages: int, page_size: int) -> Any:  # noqa: ANN401  the module of either version
    """A `CacheDescriptor` over KV memory as small as it gets: one head of one number."""
    import torch

    manager = package.PagedKVCacheManager(num_pages, page_size, 1, 1, torch.float16, torch.device("cpu"))
    return package.CacheDescriptor(manager)


class Batch:
    """Sequences of `pages` pages; `last` says how full the last page of each is."""

    def __init__(self, package: Any, last: list[int], pages: int, page_size: int) -> None:  # noqa: ANN401  a module
        num_pages = len(last) * (pages + MOST_STEPS // page_size + 2)
        self.descriptor = descriptor(package, num_pages, page_size)
        self.seq_ids = list(range(len(last)))
        self.descriptor.allocate(self.seq_ids, [(pages - 1) * page_size + used for used in last])
        self.page_size = page_size

    def pack(self, seq_ids: list[int]) -> Any:  # noqa: ANN401  the packed data of either version
        """All tables."""
        return self.descriptor.pack_for_flashinfer(seq_ids)

    def step(self, seq_ids: list[int]) -> None:
        """A decode step and its packing."""
        self.descriptor.allocate_decoding(seq_ids)
        self.descriptor.pack_for_flashinfer(seq_ids)

    def orders(self) -> Iterator[list[list[int]]]:
        """The batch, each time beginning with another sequence."""
        for at in limited(0.3, most=len(self.seq_ids)):
            yield [self.seq_ids[at:] + self.seq_ids[:at]]

    def after_steps(self, skip_growth: int = 0) -> Iterator[list[list[int]]]:
        """The batch after one decode step after another; never after the step that fills `skip_growth` slots."""
        self.pack(self.seq_ids)
        for at in limited(0.2, most=MOST_STEPS):
            if skip_growth and at % (skip_growth - 1) == skip_growth - 2:
                self.descriptor.allocate(self.seq_ids, [2] * len(self.seq_ids))
                self.pack(self.seq_ids)
            self.descriptor.allocate_decoding(self.seq_ids)
            yield [self.seq_ids]


def prepare(adapter: Any, *, batch: int, pages: int, page_size: int) -> TakeSamples:  # noqa: ANN401  impls.load
    """Remembers the sizes: each run begins with new sequences."""
    package = adapter.seqattn
    aligned, staggered = [1] * batch, [1 + i % page_size for i in range(batch)]

    def take() -> dict[str, Sample]:
        work = Batch(package, staggered, pages, page_size)
        work.pack(work.seq_ids)
        samples = {"pack": Sample(time_groups(work.pack, work.orders()))}
        samples |= _concatenations(work)
        samples["again, tables grown"] = Sample(time_groups(work.pack, work.after_steps()))
        work = Batch(package, aligned, pages, page_size)
        samples["again, same tables"] = Sample(time_groups(work.pack, work.after_steps(skip_growth=page_size)))
        work = Batch(package, staggered, pages, page_size)
        work.pack(work.seq_ids)
        samples["step"] = Sample(time_groups(work.step, ([work.seq_ids] for _ in limited(0.2, most=MOST_STEPS))))
        return samples

    return take


def _concatenations(work: Batch) -> dict[str, Sample]:
    """What numpy needs to put the same tables back to back, if they are arrays."""
    found = [work.descriptor.seq_id_to_data[seq_id] for seq_id in work.seq_ids]
    if not hasattr(found[0], "pages"):
        return {}
    tables = [np.asarray(data.pages) for data in found]
    groups = ([tables[i:] + tables[:i]] for i in limited(0.2, most=len(tables)))
    return {"concatenate": Sample(time_groups(np.concatenate, groups))}


if __name__ == "__main__":
    main("pack", OPTIONS)
