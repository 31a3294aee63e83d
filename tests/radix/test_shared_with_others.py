"""One allocator, several owners: a cache, pages held by hand, a descriptor beside the cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pytest

from radix import PrefixCache
from radix.node import Node
from seqattn import CacheDescriptor, PageAllocator
from seqattn.errors import InvariantError, NoPageError, PageError


def cached(num_pages: int, *prompts: list[int]) -> PrefixCache:
    """A cache with pages of four tokens that holds these prompts, all idle."""
    cache = PrefixCache(PageAllocator(num_pages, 4))
    for prompt in prompts:
        cache.start("x", prompt)
        cache.finish("x")
    return cache


def test_pages_are_not_looked_at_for_good_after_a_cut() -> None:
    """A cut inside a page may leave it shared; once a sequence has grown its last page is its own."""
    cache = cached(8, [1, 2, 3, 4])
    for seq_id in "ab":
        cache.start(seq_id, [1, 2, 3, 4, 5, 6])
        cache.truncate(seq_id, 3)
    assert all(run.may_end_shared for run in cache.state.running.values())
    cache.extend(["a", "b"], [7, 8])
    assert not any(run.may_end_shared for run in cache.state.running.values())
    first, second = (cache.descriptor.seq_id_to_data[seq_id].last_page for seq_id in "ab")
    assert first != second
    cache.check()


def test_a_page_that_a_descriptor_took_over_is_not_evicted() -> None:
    cache = cached(2, [1, 2, 3, 4])
    pages = cache.match([1, 2, 3, 4]).pages
    cache.manager.ref(pages)
    other = CacheDescriptor(cache.manager)
    other.attach("mine", pages, 4)
    assert cache.num_reclaimable_pages == 0
    assert not cache.can_start([9] * 8)
    with pytest.raises(NoPageError, match="2 pages needed, 1 available"):
        cache.start("b", [9] * 8)
    cache.check(outside=other.held_pages())
    other.release(["mine"])
    assert cache.start("b", [9] * 8).num_cached_tokens == 0
    cache.check()


def test_what_lies_above_a_page_held_by_hand_stays_too() -> None:
    cache = cached(3, list(range(12)))
    last = cache.match(list(range(12))).pages[2:]
    cache.manager.ref(last)
    assert cache.num_reclaimable_pages == 0 == cache.evict(3)
    cache.manager.unref(last)
    assert cache.evict(3) == 3


def test_a_source_held_by_hand_is_forked_although_no_page_is_spare() -> None:
    cache = cached(2, [1])
    cache.manager.ref(cache.manager.as_pages([cache.match([1]).tail_page or 0]))
    assert cache.start("b", [1, 2]).num_cached_tokens == 1
    cache.check(outside=[0])


@pytest.mark.parametrize("outside", [[], [0, 0]])
def test_check_with_a_list_wants_exactly_that_list(outside: list[int]) -> None:
    cache = PrefixCache(PageAllocator(4, 4))
    pages = cache.manager.allocate(1)
    cache.check()
    cache.check(outside=pages)
    with pytest.raises(InvariantError, match="P3"):
        cache.check(outside=outside)


def test_check_knows_pages_that_another_descriptor_took_over() -> None:
    cache = PrefixCache(PageAllocator(8, 4))
    pages = cache.manager.allocate(1)
    CacheDescriptor(cache.manager).attach(1, pages, 4)
    cache.check(outside=pages)
    with pytest.raises(InvariantError, match="P3"):
        cache.check()


def test_a_page_held_by_hand_does_not_make_starts_look_at_every_idle_node() -> None:
    cache = cached(64, *([n] * 4 for n in range(60)))
    cache.manager.allocate(1)  # a padding page, say
    looked_at = []

    class Queue(OrderedDict[Node, None]):
        def __iter__(self) -> Iterator[Node]:
            for node in super().__iter__():
                looked_at.append(node)
                yield node

    cache.tree.idle = Queue(cache.tree.idle)
    cache.start("b", [99] * 20)
    assert 0 < len(looked_at) < 5


def test_references_of_sequences_cannot_be_given_back_by_hand() -> None:
    manager = PageAllocator(4, 4)
    descriptor = CacheDescriptor(manager)
    descriptor.allocate([1], [4])
    for give in (manager.unref, manager.release_pages):
        with pytest.raises(PageError, match="0 are held by hand"):
            give([0])
    with pytest.raises(PageError, match="not the caller's"):
        descriptor.attach(2, [0], 4)
    assert np.array_equal(manager.ref_count, [1, 0, 0, 0])
    descriptor.check()
