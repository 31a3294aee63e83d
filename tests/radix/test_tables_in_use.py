"""What a running sequence remembers of its table is right whatever happens to it: lives in which it once was not."""

from __future__ import annotations

import pytest

from radix import PrefixCache
from seqattn import PageAllocator


def pages_of(cache: PrefixCache, seq_id: int) -> list[int]:
    return cache.descriptor.seq_id_to_data[seq_id].kv_page_indices


def test_a_sequence_that_is_cut_and_publishes_as_much_gives_back_what_it_holds_then() -> None:
    cache = PrefixCache(PageAllocator(20, 2))
    cache.start(0, [1, 2, 3, 4])
    cache.finish(0)
    cache.start(1, [1, 2, 3, 4, 5])
    cache.truncate(1, 2)
    cache.extend([1], [[7, 8]])
    cache.publish(1)
    cache.check()
    cache.finish(1)
    cache.check()


@pytest.mark.parametrize("end", ["abort", "finish"])
def test_a_sequence_that_starts_again_under_its_id_is_packed_as_it_is_now(end: str) -> None:
    cache, ids = PrefixCache(PageAllocator(40, 2)), [0, 1, 2, 3, 4]
    for seq_id in ids:
        cache.start(seq_id, [seq_id, 9, seq_id])
    cache.pack_for_flashinfer(ids)
    getattr(cache, end)(2)
    cache.start(2, [2] * 7)
    packed = cache.pack_for_flashinfer(ids)
    assert packed.kv_page_indices.tolist() == [page for seq_id in ids for page in pages_of(cache, seq_id)]


def test_a_page_that_somebody_references_by_hand_is_copied_before_it_is_written() -> None:
    cache = PrefixCache(PageAllocator(20, 4))
    cache.start(0, [1, 2])
    pages = pages_of(cache, 0)
    cache.manager.ref(pages)
    cache.extend([0], [5])
    assert pages_of(cache, 0) != pages
    cache.check(outside=pages)


def test_a_page_cut_while_others_hold_it_is_copied_once() -> None:
    cache = PrefixCache(PageAllocator(20, 4))
    cache.start(0, [1, 2, 3, 4, 5])
    cache.publish(0)
    cache.start(1, [1, 2, 3, 4, 5])
    cache.truncate(1, 2)
    shared = pages_of(cache, 1)
    assert shared == pages_of(cache, 0)[:1]
    cache.extend([1], [8])
    own = pages_of(cache, 1)
    assert own != shared
    assert cache.stats.num_forked_pages == 1
    for token in range(3):
        cache.extend([1], [token])
    assert pages_of(cache, 1)[:1] == own
    assert cache.stats.num_forked_pages == 1
    cache.check()
