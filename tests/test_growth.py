"""What an operation costs must not grow with what it does not touch: counted, never timed.

The design's claims, one test each: flat in idle leaves, earlier turns and cached tokens, linear in what is new. What
may be copied stands beside each as bytes a token. At the end, wasteful versions show that the tests can fail.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from radix import PrefixCache, RadixTree
from radix import tree as tree_module
from seqattn import CacheDescriptor, PageAllocator
from tests.counting import Cost, assert_flat, assert_linear, cost

PAGE_SIZE = 16
FEW, MANY = 100, 10_000
ANSWER = np.arange(24, dtype=np.int32)

#: A start keeps the prompt as a key of 4 bytes a token, and a page table, whose references it counts: four arrays of up
#: to 8 bytes a page, with room for an eighth more pages.
STARTED_TOKEN = 4 + 4 * 8 / PAGE_SIZE
#: An end gives a reference to each page back: the same arrays, and no token.
ENDED_TOKEN = 4 * 8 / PAGE_SIZE


def random_tokens(seed: int, *shape: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 1 << 30, shape, dtype=np.int32)


def full_cache(num_leaves: int) -> tuple[PrefixCache, npt.NDArray[np.int32]]:
    """A cache without a free page: prompts of a page and a half, nobody's any more. And those prompts, oldest first."""
    cache = PrefixCache(PageAllocator(2 * num_leaves, PAGE_SIZE))
    prompts = random_tokens(0, num_leaves, PAGE_SIZE * 3 // 2)
    for prompt in prompts:
        cache.start("a", prompt)
        cache.finish("a")
    assert cache.num_reclaimable_pages == 2 * num_leaves
    return cache, prompts


def cached(num_tokens: int) -> tuple[PrefixCache, npt.NDArray[np.int32]]:
    """A cache with room that knows one prefix, and that prefix followed by 72 tokens it does not know."""
    cache = PrefixCache(PageAllocator(2 * num_tokens // PAGE_SIZE + 64, PAGE_SIZE))
    prompt = random_tokens(1, num_tokens + 72)
    cache.start("a", prompt[:num_tokens])
    cache.finish("a")
    return cache, prompt


def turn(cache: PrefixCache, prompt: npt.NDArray[np.int32]) -> None:
    """A turn of a chat: a prompt, an answer of 24 tokens, the first of them alone, and the end."""
    cache.start("a", prompt)
    cache.extend(["a"], [0])
    cache.extend(["a"], [ANSWER[1:]])
    cache.finish("a")


def sequences(batch: int, num_pages: int) -> CacheDescriptor:
    """So many sequences of so many pages each."""
    descriptor = CacheDescriptor(PageAllocator(batch * (num_pages + 1), PAGE_SIZE))
    descriptor.allocate(range(batch), [num_pages * PAGE_SIZE] * batch)
    return descriptor


# -- flat in leaves ----------------------------------------------------------------------------------------------------


def turn_among(num_leaves: int) -> Cost:
    """Turns that begin with a cached prompt and evict for the rest."""
    cache, prompts = full_cache(num_leaves)
    latest = iter(np.concatenate((prompts[-20:], random_tokens(2, 20, PAGE_SIZE)), axis=1))
    return cost(lambda: lambda: turn(cache, next(latest)), 5)


def test_a_turn_costs_the_same_whatever_else_is_cached() -> None:
    assert_flat(turn_among(FEW), turn_among(MANY))


def eviction_among(num_leaves: int) -> Cost:
    cache, _ = full_cache(num_leaves)
    return cost(lambda: lambda: cache.evict(1), 8)


def test_evicting_a_page_costs_the_same_whatever_else_is_cached() -> None:
    assert_flat(eviction_among(FEW), eviction_among(MANY))


def start_with_a_page_held_by_hand(num_leaves: int) -> Cost:
    """Starts that evict, of prompts that nothing is known of."""
    cache, prompts = full_cache(num_leaves)
    cache.manager.ref(cache.match(prompts[0]).pages)
    fresh = enumerate(random_tokens(3, 20, PAGE_SIZE * 3 // 2))

    def start() -> None:
        seq_id, prompt = next(fresh)
        assert cache.can_start(prompt)
        cache.start(seq_id, prompt)

    return cost(lambda: start, 5)


def test_a_start_costs_the_same_with_a_page_held_by_hand() -> None:
    assert_flat(start_with_a_page_held_by_hand(FEW), start_with_a_page_held_by_hand(MANY))


def questions_among(num_leaves: int) -> Cost:
    cache, prompts = full_cache(num_leaves)
    fresh = random_tokens(4, PAGE_SIZE)

    def ask() -> None:
        assert cache.can_start(fresh)
        assert cache.match(prompts[3]).num_tokens == len(prompts[3])
        assert cache.num_reclaimable_pages == 2 * num_leaves

    return cost(lambda: ask, 3)


def test_asking_costs_the_same_whatever_else_is_cached() -> None:
    assert_flat(questions_among(FEW), questions_among(MANY))


# -- flat in what is cached, but for its copy --------------------------------------------------------------------------


def part_of_turn(which: str, num_cached: int) -> Cost:
    """One of the three calls of a turn that begins with so many cached tokens."""

    def prepare() -> Callable[[], object]:
        cache, prompt = cached(num_cached)
        parts: dict[str, Callable[[], object]] = {
            "start": lambda: cache.start("b", prompt),
            "extend": lambda: cache.extend(["b"], [prompt[:100]]),
            "finish": lambda: cache.finish("b"),
        }
        for name in list(parts)[: list(parts).index(which)]:
            parts[name]()
        return parts[which]

    return cost(prepare)


def test_a_start_copies_the_prompt_once() -> None:
    few, many = 1024, 65_536
    assert_flat(part_of_turn("start", few), part_of_turn("start", many), more_bytes=STARTED_TOKEN * (many - few))
    # With five tokens in the last page, which is not shared, the edge is cut in two, which copies it.
    few, many, more = few + 5, many + 5, STARTED_TOKEN + 4
    assert_flat(part_of_turn("start", few), part_of_turn("start", many), more_bytes=more * (many - few))


def test_an_extension_copies_no_cached_token() -> None:
    assert_flat(part_of_turn("extend", 1024), part_of_turn("extend", 65_536))


def test_an_end_gives_pages_back_and_copies_no_cached_token() -> None:
    few, many, more = 1024, 15_360, ENDED_TOKEN + 4  # an edge grows in place up to 16,384 tokens, and is copied then
    assert_flat(part_of_turn("finish", few), part_of_turn("finish", many), more_bytes=more * (many - few))
    few, many, more = 32_768, 131_072, ENDED_TOKEN
    assert_flat(part_of_turn("finish", few), part_of_turn("finish", many), more_bytes=more * (many - few))


def prompt_of(num_new: int) -> Cost:
    """All of a turn of which nothing is cached."""

    def prepare() -> Callable[[], object]:
        cache = PrefixCache(PageAllocator(2 * num_new // PAGE_SIZE + 8, PAGE_SIZE))
        return lambda: turn(cache, random_tokens(8, num_new))

    return cost(prepare)


def test_new_tokens_cost_their_bytes_and_no_call() -> None:
    few, many = 1024, 16_384
    # The tokens that the prompt is made from, its key, and the edge.
    assert_flat(prompt_of(few), prompt_of(many), more_bytes=(4 + STARTED_TOKEN + 4) * (many - few))


def lookup_of(num_cached: int) -> Cost:
    cache, prompt = cached(num_cached)
    return cost(lambda: lambda: cache.match(prompt))


def test_a_lookup_copies_no_token() -> None:
    assert_flat(lookup_of(1024), lookup_of(131_072))


def turn_after(num_turns: int) -> Cost:
    """The turn after so many, each of which says 24 tokens and hears 24."""

    def prepare() -> Callable[[], object]:
        cache = PrefixCache(PageAllocator(1024, PAGE_SIZE))
        tokens = random_tokens(5, 5)
        for seed in range(num_turns + 1):
            prompt = np.concatenate((tokens, random_tokens(seed, 24)))
            if seed < num_turns:
                turn(cache, prompt)
            tokens = np.concatenate((prompt, ANSWER))
        return lambda: turn(cache, prompt)

    return cost(prepare)


def test_a_turn_costs_the_same_after_however_many_turns() -> None:
    # The edge that the turn makes longer is cut in two at its last page, put together again and so copied twice.
    assert_flat(turn_after(1), turn_after(64), more_bytes=(STARTED_TOKEN + 8) * 63 * 48)


def publication_after(num_published: int) -> Cost:
    """Chunks of a long prompt, each published as soon as it is computed."""

    def prepare() -> Callable[[], object]:
        cache = PrefixCache(PageAllocator(8192, PAGE_SIZE))
        chunks = iter(random_tokens(6, 256, 256))
        cache.start("a", next(chunks))

        def publish() -> None:
            cache.publish("a")
            cache.extend(["a"], [next(chunks)])

        for _ in range(num_published // 256):
            publish()
        return publish

    return cost(prepare, 4)


def test_publishing_a_chunk_costs_the_same_however_much_was_published() -> None:
    # An edge that grows is copied, and old and new are there at once; at 16,384 tokens the next edge begins.
    assert_flat(publication_after(1024), publication_after(14_336), more_bytes=8 * (14_336 - 1024))
    # Whoever publishes uses the whole path, edge by edge: two of them here, four there.
    two_edges = publication_after(16_384 + 4096)
    assert_flat(two_edges, publication_after(16_384 * 3 + 4096), more_bytes=8 * 16_384)


def evictions_from(num_tokens: int) -> Cost:
    """64 pages, one by one, from the end of one long leaf."""

    def prepare() -> Callable[[], object]:
        cache, _ = cached(num_tokens)
        return lambda: cache.evict(1)

    return cost(prepare, 64)


def test_evicting_page_by_page_costs_the_same_from_a_leaf_of_any_length() -> None:
    # What is left of the edge is copied, of a long one its last 16,384 tokens at most; old and new are there at once.
    assert_flat(evictions_from(1040), evictions_from(131_072), more_bytes=8 * 16_384)


# -- batches -----------------------------------------------------------------------------------------------------------


def pack_of(batch: int, num_pages: int) -> Cost:
    def prepare() -> Callable[[], object]:
        descriptor = sequences(batch, num_pages)
        return lambda: descriptor.pack_for_flashinfer(range(batch))

    return cost(prepare)


def test_packing_copies_the_tables_once() -> None:
    # The buffer has room for an eighth more.
    assert_flat(pack_of(256, 16), pack_of(256, 2048), more_bytes=4.5 * 256 * 2048)


def test_packing_is_linear_in_the_batch() -> None:
    assert_linear(pack_of(16, 16), pack_of(256, 16), 16)


def pack_again(num_pages: int) -> Cost:
    """Steps that stay within each last page."""
    descriptor = sequences(64, num_pages)
    for seq_id in range(64):
        descriptor.truncate(seq_id, num_pages * PAGE_SIZE - 8)
    packed = []  # kept, or else their memory would be used again and none be allocated

    def step() -> None:
        descriptor.allocate_decoding(range(64))
        packed.append(descriptor.pack_for_flashinfer(range(64)))

    return cost(lambda: step, 3)


def test_packing_again_copies_no_table_if_none_has_changed() -> None:
    assert_flat(pack_again(16), pack_again(2048))


def step_of(batch: int) -> Cost:
    """A decode step: one token for each sequence, and for each a page."""

    def prepare() -> Callable[[], object]:
        cache = PrefixCache(PageAllocator(4 * batch, PAGE_SIZE))
        cache.start_many(range(batch), list(random_tokens(7, batch, PAGE_SIZE * 2)))
        return lambda: cache.extend(range(batch), np.arange(batch, dtype=np.int32))

    return cost(prepare)


def test_a_decode_step_is_linear_in_the_batch() -> None:
    few, many = step_of(16), step_of(256)
    assert_linear(few, many, 16)
    assert many.calls <= 20 * 256


# -- the tests above can fail ------------------------------------------------------------------------------------------


def each_leaf(cache: PrefixCache, *_: object) -> object:
    return min(cache.tree, key=lambda node: node.stamp)


def each_pair(_: object, seq_ids: Sequence[int]) -> object:
    return [seq_id for seq_id in seq_ids for other in seq_ids if seq_id == other]


def each_table(descriptor: CacheDescriptor, seq_ids: Sequence[int]) -> object:
    return [descriptor.data_of(seq_id).kv_page_indices for seq_id in seq_ids]


def another_key(cache: PrefixCache, seq_ids: Sequence[str], *_: object) -> object:
    return np.empty(cache.descriptor.num_tokens(seq_ids[0]), dtype=np.int32)  # of one letter, or a list of one


Guard = Callable[[], None]
Wasteful = tuple[tuple[type, str], Callable[..., object], Guard, str]
START, EXTEND, END = (PrefixCache, "start"), (PrefixCache, "extend"), (PrefixCache, "finish")
EVICT, FITS, LOOK_UP = (PrefixCache, "evict"), (PrefixCache, "can_start"), (PrefixCache, "match")
PACK = (CacheDescriptor, "pack_for_flashinfer")

#: A method, what it does needlessly, the test that notices, and by what.
WASTES: list[Wasteful] = [
    (START, each_leaf, test_a_turn_costs_the_same_whatever_else_is_cached, "calls"),
    (END, lambda c, _: c.manager.ref_count + 1, test_a_turn_costs_the_same_whatever_else_is_cached, "num_bytes"),
    (EVICT, each_leaf, test_evicting_a_page_costs_the_same_whatever_else_is_cached, "calls"),
    (FITS, lambda c, _: c.num_reclaimable_pages, test_a_start_costs_the_same_with_a_page_held_by_hand, "calls"),
    (LOOK_UP, each_leaf, test_asking_costs_the_same_whatever_else_is_cached, "calls"),
    (START, lambda _, __, tokens: tokens + 0, test_a_start_copies_the_prompt_once, "num_bytes"),
    (EXTEND, another_key, test_an_extension_copies_no_cached_token, "num_bytes"),
    (START, lambda _, __, tokens: tokens.tolist(), test_new_tokens_cost_their_bytes_and_no_call, "num_bytes"),
    (END, another_key, test_an_end_gives_pages_back_and_copies_no_cached_token, "num_bytes"),
    (LOOK_UP, lambda _, tokens: tokens + 0, test_a_lookup_copies_no_token, "num_bytes"),
    (PACK, each_table, test_packing_copies_the_tables_once, "num_bytes"),
    (PACK, each_table, test_packing_again_copies_no_table_if_none_has_changed, "num_bytes"),
    (PACK, each_pair, test_packing_is_linear_in_the_batch, "lines"),
    (EXTEND, lambda c, ids, _: each_pair(c, ids), test_a_decode_step_is_linear_in_the_batch, "lines"),
]


@pytest.mark.parametrize("wasteful", WASTES, ids=range(len(WASTES)))
def test_a_method_that_wastes_is_noticed(monkeypatch: pytest.MonkeyPatch, wasteful: Wasteful) -> None:
    (owner, name), waste, guard, what = wasteful
    original = getattr(owner, name)

    def slow(self: object, *args: object) -> object:
        # Only while it is counted: what is prepared would take too long.
        _kept = waste(self, *args) if sys.getprofile() or tracemalloc.is_tracing() else None
        return original(self, *args)

    monkeypatch.setattr(owner, name, slow)
    with pytest.raises(AssertionError, match=f"^{what} grew"):
        guard()


GROWING = [
    test_a_turn_costs_the_same_after_however_many_turns,
    test_publishing_a_chunk_costs_the_same_however_much_was_published,
]


@pytest.mark.parametrize("guard", GROWING)
def test_edges_that_do_not_grow_are_noticed(monkeypatch: pytest.MonkeyPatch, guard: Guard) -> None:
    monkeypatch.setattr(RadixTree, "append", lambda *_: None)
    with pytest.raises(AssertionError, match=r"^(calls|lines) grew"):
        guard()


def test_a_long_edge_that_is_copied_for_each_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_LONGEST_CUT", 1 << 30)
    with pytest.raises(AssertionError, match=r"^num_bytes grew"):
        test_evicting_page_by_page_costs_the_same_from_a_leaf_of_any_length()


def test_the_counts_of_a_small_function_are_those_of_its_picture() -> None:
    def total(numbers: list[int]) -> int:
        n = 0
        for number in numbers:
            n += number
        return n

    numbers = [7, 8, 9]
    found = cost(lambda: lambda: total(numbers))
    assert (found.calls, found.lines) == (1 + 1, 1 + 9)  # and those of the lambda
    assert found.num_bytes < 256
    assert 0 <= cost(lambda: lambda: np.empty(1 << 20, dtype=np.int8), 3).num_bytes - (1 << 20) < 256
