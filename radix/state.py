"""The parts that make up a prefix cache, passed between the modules that work on them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, cast

from attrs import define, field

from radix.reserve import Reserve
from radix.retries import Retries
from radix.stats import CacheStats
from radix.tree import RadixTree
from seqattn.descriptor import CacheDescriptor

if TYPE_CHECKING:
    from radix.history import History
    from radix.running import Pin, Running
    from seqattn.pages import PageAllocator

__all__ = ["State"]


@define(slots=True, eq=False)
class State:
    """Allocator, tree and page tables, and who runs and who is pinned; `check_cache` says how they fit together."""

    manager: PageAllocator
    history: History
    tree: RadixTree = field(init=False)
    descriptor: CacheDescriptor = field(init=False)
    running: dict[Hashable, Running] = field(init=False)
    pins: dict[Pin, None] = field(init=False, factory=dict)  # in the order of their making
    stats: CacheStats = field(init=False, factory=CacheStats)
    retries: Retries = field(init=False, factory=Retries)
    reserve: Reserve = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.tree = RadixTree(self.manager.page_size)
        self.descriptor = CacheDescriptor(self.manager)
        self.running = cast("dict[Hashable, Running]", self.descriptor.seq_id_to_data)
        self.reserve = Reserve(self.manager, self.tree, self.stats, self.history)
