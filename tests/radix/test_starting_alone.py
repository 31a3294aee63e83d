"""One sequence at a time takes a shorter way than a batch: the same counts, and no more looked at."""

from __future__ import annotations

import numpy as np
import pytest

from radix import PrefixCache
from seqattn import PageAllocator
from seqattn.errors import NoPageError
from tests.counting import Cost, assert_flat, cost


def test_a_start_that_forks_a_tail_counts_one_reuse_of_each_page() -> None:
    cache = PrefixCache(PageAllocator(16, 2))
    cache.start(0, [1, 2, 3, 4, 5, 6])
    cache.finish(0)
    cache.start(1, [1, 2, 3, 9])
    assert [node.num_reuses for node in cache.tree] == [1, 1, 0]
    cache.abort(1)
    cache.evict(3)
    assert cache.stats.evicted_reuses[:3] == [1, 2, 0]


def test_pages_that_a_start_evicts_are_counted_by_age_and_reuses() -> None:
    cache = PrefixCache(PageAllocator(4, 2))
    cache.start(0, [1, 2, 3, 4])
    cache.finish(0)
    cache.start(1, [1, 2, 3, 4, 5])
    cache.abort(1)
    cache.start(2, [7] * 8)
    assert sum(cache.stats.evicted_ages) == cache.stats.num_evicted_pages == 2
    assert cache.stats.evicted_reuses[:3] == [0, 2, 0]


def failing_start(num_leaves: int) -> Cost:
    """Starts that lack pages although so many leaves are idle."""
    cache = PrefixCache(PageAllocator(num_leaves + 2, 2))
    for token in range(num_leaves):
        cache.start(0, [token, token])
        cache.finish(0)
    cache.start("runs", [1 << 20] * 6)
    prompt = np.full(2 * num_leaves, 1 << 21, dtype=np.int32)

    def start() -> None:
        with pytest.raises(NoPageError):
            cache.start(1, prompt)

    return cost(lambda: start, 3)


def test_a_start_that_fails_costs_the_same_however_many_leaves_are_idle() -> None:
    assert_flat(failing_start(50), failing_start(2000), more_bytes=12 * (2 * 2000))  # the key, and a page table


def test_a_table_that_had_to_move_for_an_extend_in_vain_is_still_the_sequence_s() -> None:
    cache = PrefixCache(PageAllocator(24, 1))
    first = list(range(8))
    cache.start("a", first)
    cache.start("b", first)
    cache.finish("a")
    with pytest.raises(NoPageError):
        cache.extend(["b"], [[50 + n for n in range(20)]])
    cache.publish("b")  # takes the tree's pages for its own
    cache.extend(["b"], [[60, 61]])
    assert cache.descriptor.data_of("b").pages[:8].tolist() == cache.match(first).pages.tolist()
    cache.check()


@pytest.mark.parametrize("seq_ids", [{"a": 0}, {"a"}, ("a",), {"a": 0}.keys()])
def test_ids_may_come_in_any_collection(seq_ids: object) -> None:
    cache = PrefixCache(PageAllocator(4, 4))
    cache.start("a", [1])
    cache.extend(seq_ids, [5])  # type: ignore[arg-type]
    assert cache.descriptor.num_tokens("a") == 2
