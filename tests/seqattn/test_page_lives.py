"""Long seeded lives of an allocator against a count of references that a dictionary keeps."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from seqattn.errors import NoPageError, PageError
from seqattn.pages import PageAllocator


class Ledger:
    """An allocator and every reference there is: one list for those by hand, one for each owner with books."""

    def __init__(self, num_pages: int) -> None:
        self.pool = PageAllocator(num_pages, 4)
        self.by_hand: list[int] = []
        self.owned: list[list[int]] = []

    def counts(self) -> Counter[int]:
        return Counter([*self.by_hand, *(page for pages in self.owned for page in pages)])

    def num_free(self) -> int:
        return self.pool.num_pages - len(self.counts())

    def get(self, num_pages: int, *, by_hand: bool) -> bool:
        """Takes pages, or finds that there are too few."""
        method = self.pool.allocate if by_hand else self.pool.take
        if num_pages > self.num_free():
            with pytest.raises(NoPageError):
                method(num_pages)
            return False
        pages = method(num_pages).tolist()
        assert len(set(pages)) == num_pages
        assert not set(pages) & self.counts().keys(), "a page was handed out that somebody holds"
        if by_hand:
            self.by_hand += pages
        else:
            self.owned.append(pages)
        return True

    def ref(self, pages: list[int]) -> bool:
        if not set(pages) <= self.counts().keys():
            with pytest.raises(PageError):
                self.pool.ref(pages)
            return False
        self.pool.ref(pages)
        self.by_hand += pages
        return True

    def unref(self, pages: list[int]) -> bool:
        """Gives back what is held by hand; more than anybody holds is refused."""
        named = Counter(pages)
        if not named <= self.counts():
            with pytest.raises(PageError):
                self.pool.unref(pages)
            return False
        if named <= Counter(self.by_hand):
            self.pool.unref(pages)
            self.by_hand = list((Counter(self.by_hand) - named).elements())
        return True

    def hold(self, pages: list[int]) -> bool:
        self.pool.hold(np.array(pages, dtype=np.int32))
        self.owned.append(pages)
        return True

    def drop(self, index: int) -> bool:
        before, pages = self.num_free(), self.owned.pop(index)
        assert self.pool.drop(np.array(pages, dtype=np.int32)) == self.num_free() - before
        return True

    def compare(self) -> None:
        counts = self.counts()
        assert self.pool.ref_count.tolist() == [counts[page] for page in range(self.pool.num_pages)]
        assert sorted(self.pool.free_pages.tolist()) == sorted(set(range(self.pool.num_pages)) - counts.keys())
        assert self.pool.num_outside_refs == len(self.by_hand)

    def end(self) -> None:
        """Everything given back, every page is free."""
        holders = [*self.by_hand, *(page for pages in self.owned for page in pages)]
        self.pool.check(np.array(holders, dtype=np.int32), exact=True)
        self.pool.release_pages(self.by_hand)
        for pages in self.owned:
            self.pool.drop(np.array(pages, dtype=np.int32))
        assert self.pool.available_pages_count == self.pool.num_pages
        self.pool.check(np.empty(0, dtype=np.int32), exact=True)


def random_life(seed: int, num_steps: int) -> Counter[str]:
    """A seeded life of an allocator; returns how often each call was made, and how often one was refused."""
    rng = random.Random(seed)
    ledger = Ledger(rng.randint(1, 12))
    made: Counter[str] = Counter()
    for _ in range(num_steps):
        made[random_step(rng, ledger)] += 1
        ledger.compare()
    ledger.end()
    return made


def random_step(rng: random.Random, ledger: Ledger) -> str:
    """One call, drawn; returns its name."""
    most = ledger.pool.num_pages
    names = ["allocate", "ref", "unref", "take", *["hold", "drop", "drop"] * bool(ledger.owned)]
    name, pages = rng.choice(names), rng.choices(range(-1, most + 1), k=rng.randint(0, 3))
    if rng.random() < 0.7 and ledger.by_hand:
        pages = rng.choices(ledger.by_hand, k=rng.randint(0, 3))
    calls = {
        "allocate": lambda: ledger.get(rng.randint(0, most // 2 + 1), by_hand=True),
        "take": lambda: ledger.get(rng.randint(0, most // 2 + 1), by_hand=False),
        "ref": lambda: ledger.ref(pages),
        "unref": lambda: ledger.unref(pages),
        "hold": lambda: ledger.hold(rng.choice(ledger.owned)[: rng.randint(0, most)]),
        "drop": lambda: ledger.drop(rng.randrange(len(ledger.owned))),
    }
    return name if calls[name]() else f"{name} refused"


@pytest.mark.parametrize("seed", range(10))
def test_a_random_life_agrees_with_the_ledger(seed: int) -> None:
    random_life(seed, 200)


def test_random_lives_make_every_call_and_are_refused_some() -> None:
    made = sum((random_life(seed, 200) for seed in range(100, 110)), Counter())
    refused = [f"{name} refused" for name in ("allocate", "ref", "unref", "take")]
    assert min(made[name] for name in ("allocate", "ref", "unref", "take", "hold", "drop", *refused)) > 20, made
