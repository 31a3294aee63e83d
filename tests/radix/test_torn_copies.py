"""A copy that fails between keys and values, in real KV memory with no page free: nothing has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from radix.cache import PrefixCache
from seqattn.cache import PagedKVCacheManager
from tests.radix.state import snapshot
from tests.seqattn.test_cache import TornTensor

VICTIM = [20, 21, 22, 23, 24, 25, 26]
SHARED = [1, 2, 3, 4, 5, 6]


def rows(tokens: Sequence[int]) -> torch.Tensor:
    """Keys that tell a token and its position, [tokens, 1, 2]."""
    return torch.tensor(list(enumerate(tokens)), dtype=torch.float32).view(len(tokens), 1, 2)


def compute(cache: PrefixCache, seq_id: int, tokens: Sequence[int], num_cached: int = 0) -> None:
    """Writes the KV of the tokens that are not cached; values are the negative keys."""
    new = rows(tokens)[num_cached:]
    manager = cache.manager
    assert isinstance(manager, PagedKVCacheManager)
    indptr = torch.tensor([0, len(new)], dtype=torch.int32)
    manager.append_kv(new, -new, cache.pack_for_flashinfer([seq_id]), indptr)


def full_cache() -> PrefixCache:
    """Four pages of four slots: the victim's are the older two; the last page holds two tokens."""
    cache = PrefixCache(PagedKVCacheManager(4, 4, 1, 2, torch.float32, "cpu"))
    for seq_id, tokens in enumerate((VICTIM, SHARED)):
        cache.start(seq_id, tokens)
        compute(cache, seq_id, tokens)
        cache.finish(seq_id)
    return cache


def assert_holds(cache: PrefixCache, tokens: list[int], num_tokens: int | None = None) -> None:
    """The cache has the first tokens of these, and their memory is right."""
    found = cache.match(tokens)
    assert found.num_tokens == (len(tokens) if num_tokens is None else num_tokens)
    pages = [*found.pages.tolist(), *([] if found.tail_page is None else [found.tail_page])]
    assert_right(cache, pages, tokens[: found.num_tokens])


def assert_right(cache: PrefixCache, pages: list[int], tokens: list[int]) -> None:
    manager = cache.manager
    assert isinstance(manager, PagedKVCacheManager)
    for sign, memory in ((1, manager.key_cache), (-1, manager.value_cache)):
        assert torch.equal(memory[pages].flatten(0, 1)[: len(tokens)], sign * rows(tokens))


def fails_while_torn(cache: PrefixCache, call: Callable[[], object]) -> None:
    """The call fails where it reads the values, and leaves books and memory as they were."""
    manager = cache.manager
    assert isinstance(manager, PagedKVCacheManager)
    keys, values, before = manager.key_cache.clone(), manager.value_cache, snapshot(cache)
    copied = values.clone()
    manager.value_cache = values.as_subclass(TornTensor)
    with pytest.raises(MemoryError, match="no room"):
        call()
    manager.value_cache = values
    assert torch.equal(manager.key_cache, keys)
    assert torch.equal(values, copied)
    assert snapshot(cache) == before
    cache.check()


@pytest.mark.parametrize("many", [False, True])
def test_a_start_whose_copy_fails_leaves_the_victim_and_its_memory(many: bool) -> None:
    cache, prompt = full_cache(), [*SHARED, 7]

    def start() -> int:
        started = cache.start_many([5], [prompt])[0] if many else cache.start(5, prompt)
        return started.num_cached_tokens

    fails_while_torn(cache, start)
    assert_holds(cache, VICTIM)
    assert_holds(cache, SHARED)
    assert start() == 6
    compute(cache, 5, prompt, 6)
    assert_right(cache, cache.descriptor.seq_id_to_data[5].kv_page_indices, prompt)
    assert_holds(cache, VICTIM, 4)
    assert_holds(cache, SHARED)


def test_a_fork_whose_copy_fails_leaves_the_victim_and_its_memory() -> None:
    cache = full_cache()
    cache.start(5, SHARED, min_uncached_tokens=2)
    compute(cache, 5, SHARED, 4)
    fails_while_torn(cache, lambda: cache.fork(5, 6))
    assert_holds(cache, VICTIM, 4)
    cache.fork(5, 6)
    assert_right(cache, cache.descriptor.seq_id_to_data[6].kv_page_indices, SHARED)
    assert_holds(cache, VICTIM, 0)


def test_an_extend_whose_copy_fails_leaves_the_victim_and_its_memory() -> None:
    cache = full_cache()
    cache.start(5, SHARED[:4], min_uncached_tokens=0)
    cache.truncate(5, 3)
    tokens = [*SHARED[:3], 9]
    fails_while_torn(cache, lambda: cache.extend([5], [9]))
    assert_holds(cache, VICTIM)
    cache.extend([5], [9])
    compute(cache, 5, tokens, 3)
    assert_right(cache, cache.descriptor.seq_id_to_data[5].kv_page_indices, tokens)
    assert_holds(cache, SHARED)
    assert_holds(cache, VICTIM, 4)
