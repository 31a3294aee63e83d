"""Whoever holds pages by hand, in any order and not along a path: the cache stays sound and evicts none of them."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from radix.cache import PrefixCache
from seqattn.errors import NoPageError
from seqattn.pages import PageAllocator
from tests.radix.state import entries, tables
from tests.radix.world import live


class Life:
    """Random calls, and random references to any pages in use."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.manager = PageAllocator(self.rng.randint(2, 9), self.rng.choice([1, 2, 4]))
        self.cache = PrefixCache(self.manager)
        self.by_hand: list[int] = []
        self.next_id = 0

    def step(self) -> None:
        names = ["start", "start", "hold", "let_go", "evict"]
        if tables(self.cache):
            names += ["extend", "publish", "finish", "abort", "fork", "truncate"]
        with suppress(NoPageError):
            getattr(self, self.rng.choice(names))()
        self.cache.check(outside=self.by_hand)

    def tokens(self) -> list[int]:
        return self.rng.choices(range(2), k=self.rng.randint(1, 3 * self.manager.page_size))

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def some(self) -> int:
        return int(self.rng.choice(list(tables(self.cache))))

    def some_cut(self) -> tuple[int, int]:
        seq_id = self.some()
        return seq_id, self.rng.randint(0, self.cache.descriptor.num_tokens(seq_id))

    def hold(self) -> None:
        pages = [
            page for page in range(self.manager.num_pages) if self.manager.ref_count[page] and self.rng.random() < 0.4
        ]
        self.manager.ref(pages)
        self.by_hand += pages

    def let_go(self) -> None:
        if self.by_hand:
            self.manager.unref([self.by_hand.pop(self.rng.randrange(len(self.by_hand)))])

    def evict(self) -> None:
        held = {page for page, _ in entries(self.cache.tree).values() if page in self.by_hand}
        reclaimable = self.cache.num_reclaimable_pages
        wanted = self.rng.randint(0, 3)
        assert self.cache.evict(wanted) == min(wanted, reclaimable)
        assert held <= {page for page, _ in entries(self.cache.tree).values()}

    def start(self) -> None:
        self.cache.start(self.new_id(), self.tokens(), min_uncached_tokens=self.rng.randint(0, 1))

    def extend(self) -> None:
        running = list(tables(self.cache))
        some = self.rng.sample(running, self.rng.randint(1, len(running)))
        self.cache.extend(some, [self.tokens() if self.rng.random() < 0.5 else [7] for _ in some])

    def publish(self) -> None:
        seq_id, length = self.some_cut()
        self.cache.publish(seq_id, num_tokens=length)

    def finish(self) -> None:
        seq_id, length = self.some_cut()
        self.cache.finish(seq_id, num_tokens=length)

    def abort(self) -> None:
        self.cache.abort(self.some())

    def fork(self) -> None:
        self.cache.fork(self.some(), self.new_id())

    def truncate(self) -> None:
        self.cache.truncate(*self.some_cut())

    def end(self) -> None:
        """All let go and evicted, every page is free."""
        for seq_id in tables(self.cache):
            self.cache.abort(seq_id)
        self.manager.unref(self.by_hand)
        self.cache.check()
        self.cache.evict(self.manager.num_pages)
        assert self.manager.available_pages_count == self.manager.num_pages


@pytest.mark.parametrize("seed", range(30))
def test_references_to_any_pages_leave_the_cache_sound(seed: int) -> None:
    life = Life(seed)
    for _ in range(100):
        life.step()
    life.end()


def test_a_last_page_held_by_hand_is_copied_before_several_are_extended() -> None:
    manager = PageAllocator(8, 4)
    cache = PrefixCache(manager)
    for seq_id in "ab":
        cache.start(seq_id, [1, 2, 3, 4, ord(seq_id)])
    held = tables(cache)["a"][-1]
    manager.ref([held])
    cache.extend(["a", "b"], [6, 7])
    assert tables(cache)["a"][-1] != held
    cache.check()
    manager.unref([held])
    cache.check()


def test_what_is_held_by_hand_is_not_evicted_and_not_counted_on() -> None:
    world = live(2, 3, "start 0 [1,1,2,2] · finish 0 · hold 0 [1,1,2,2] · evict 3 · start 1 [3,3,3]")
    assert world.num_short == 1
    assert world.cached() == {(1, 1): 0, (1, 1, 2, 2): 1}


def test_a_page_held_by_hand_keeps_what_is_above_it() -> None:
    world = live(2, 4, "start 0 [1,1,2,2,3,3] · finish 0")
    world.memory.ref([1])
    assert world.cache.num_reclaimable_pages == 1
    assert world.cache.evict(4) == 1
    assert world.cached() == {(1, 1): 0, (1, 1, 2, 2): 1}
    world.memory.unref([1])
    assert world.cache.evict(4) == 2
