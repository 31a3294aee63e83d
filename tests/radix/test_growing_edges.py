"""Long edges: they grow in place, and are cut without being copied again and again."""

from __future__ import annotations

import numpy as np
import pytest

from radix import PrefixCache
from radix import tree as tree_module
from seqattn import PageAllocator


def num_nodes(cache: PrefixCache) -> int:
    return sum(1 for _ in cache.tree)


@pytest.mark.parametrize("whole_pages", [True, False])
def test_a_conversation_does_not_get_deeper_with_each_turn(whole_pages: bool) -> None:
    cache = PrefixCache(PageAllocator(200, 4), whole_pages=whole_pages)
    tokens = [0] * 10
    for turn in range(1, 30):
        tokens = tokens + [turn] * 7
        cache.start("a", tokens)
        cache.extend(["a"], [[turn] * 3])
        cache.finish("a")
        tokens += [turn] * 3
        cache.check()
    assert num_nodes(cache) == 1
    assert cache.match(tokens).num_tokens == len(tokens) // 4 * 4 if whole_pages else len(tokens)


def test_publishing_chunk_by_chunk_makes_one_edge() -> None:
    cache = PrefixCache(PageAllocator(64, 4))
    cache.start("a", range(8))
    for chunk in range(8, 200, 8):
        cache.publish("a")
        cache.check()
        cache.extend(["a"], [range(chunk, chunk + 8)])
    cache.publish("a")
    assert num_nodes(cache) == 1
    assert cache.match(range(200)).num_tokens == 200


def test_an_edge_that_others_hold_does_not_grow() -> None:
    cache = PrefixCache(PageAllocator(64, 4))
    cache.start("a", range(8))
    cache.publish("a")
    with cache.pin(range(8)):
        cache.extend(["a"], [range(8, 16)])
        cache.publish("a")
        cache.check()
        assert num_nodes(cache) == 2
    cache.check()


def test_edges_stop_growing_at_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_LONGEST_GROWN", 16 * 4)
    cache = PrefixCache(PageAllocator(64, 4))
    for end in range(8, 65, 8):
        cache.start("a", range(end))
        cache.finish("a")
    assert [node.num_tokens for node in cache.tree] == [16] * 4


def test_a_long_leaf_is_split_before_it_is_trimmed_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_LONGEST_CUT", 16 * 4)
    cache = PrefixCache(PageAllocator(64, 4))
    cache.start("a", range(256))
    cache.finish("a")
    for left in range(63, -1, -1):
        assert cache.evict(1) == 1
        cache.check()
        assert cache.match(range(256)).num_tokens == 4 * left
        assert all(node.num_tokens <= 128 for node in cache.tree)


def test_a_long_leaf_that_loses_most_of_itself_is_cut_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_LONGEST_CUT", 16 * 4)
    cache = PrefixCache(PageAllocator(64, 4))
    cache.start("a", range(256))
    cache.finish("a")
    assert cache.evict(50) == 50
    assert [node.num_pages for node in cache.tree] == [14]
    cache.check()


def test_a_batch_of_ids_may_come_as_an_array_or_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    for ids in (np.array([7, 8], dtype=np.int64), torch.tensor([7, 8]), [np.int32(7), torch.tensor(8)], [[7], 8]):
        cache = PrefixCache(PageAllocator(8, 4))
        cache.start_many(["a", "b"], [[1], [2]])
        cache.extend(["a", "b"], ids)
        cache.finish("a")
        cache.finish("b")
        assert cache.match([1, 7]).num_tokens == cache.match([2, 8]).num_tokens == 2


def test_a_snapshot_of_the_counters_stays_as_it_is() -> None:
    cache = PrefixCache(PageAllocator(4, 4))
    cache.start("a", range(8))
    cache.finish("a")
    before = cache.stats.snapshot()
    assert before == cache.stats
    cache.evict(2)
    assert (before.num_evicted_pages, sum(before.evicted_ages)) == (0, 0)
    assert (cache.stats.num_evicted_pages, sum(cache.stats.evicted_ages)) == (2, 2)


def test_a_namespace_that_does_not_equal_itself_is_one_namespace() -> None:
    cache = PrefixCache(PageAllocator(4, 4))
    namespace = float("nan")
    cache.start("a", [1], namespace=namespace)
    cache.abort("a")
    cache.start("a", [1], namespace=namespace)
    cache.finish("a")
    assert cache.match([1], namespace=namespace).num_tokens == 1
    assert cache.stats.num_requests == 1
    cache.check()
