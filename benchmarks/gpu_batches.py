"""Batches in memory for the GPU benchmarks: caches with values, and sequences on one prompt."""

from __future__ import annotations

from collections.abc import Sequence

from seqattn import CacheDescriptor, PagedKVCacheManager

__all__ = ["on_one_prompt", "with_values"]


def with_values(manager: PagedKVCacheManager) -> PagedKVCacheManager:
    """The manager, every slot of which holds keys and values from a normal distribution."""
    for cache in manager.get_memory_tensors():
        cache.normal_()
    return manager


def on_one_prompt(manager: PagedKVCacheManager, num_shared: int, own: Sequence[int]) -> CacheDescriptor:
    """Sequences 0, 1, ... that share a prompt of so many tokens, and have so many of their own each."""
    descriptor = CacheDescriptor(manager)
    descriptor.allocate(["prompt"], [num_shared])
    ids = list(range(len(own)))
    for i in ids:
        descriptor.fork("prompt", i)
    descriptor.allocate(ids, list(own))
    return descriptor
