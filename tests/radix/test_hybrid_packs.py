"""Hybrid batches of a cache are packed right through random lives: adopted pages, forks, cuts and evictions too."""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Any

import pytest

from radix import PrefixCache
from seqattn import PageAllocator
from tests.radix.driver import random_life
from tests.radix.world import World
from tests.seqattn.packs import MODELS, Asked, Packs, count_forests, reuse_whatever_changes


@pytest.fixture(autouse=True)
def reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    reuse_whatever_changes(monkeypatch)


class PackingWorld(World):
    """Packs what runs after most calls."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401  as of a world
        super().__init__(*arguments, **options)
        self.dice = random.Random(0)
        self.packs = Packs(self.cache.descriptor, self.cache.pack_hybrid_for_flashinfer)
        self.ids: list[Hashable] = []

    def compare(self) -> None:
        super().compare()
        dice, lens = self.dice, {seq_id: len(run.tokens) for seq_id, run in self.model.running.items()}
        here = [seq_id for seq_id in lens if lens[seq_id]]
        self.ids = [seq_id for seq_id in self.ids if seq_id in here]
        if dice.random() < 0.4:
            self.ids += dice.sample([seq_id for seq_id in here if seq_id not in self.ids], k=len(here) - len(self.ids))
        if dice.random() < 0.2:
            dice.shuffle(self.ids)
        if dice.random() < 0.8:
            its = [lens[seq_id] for seq_id in self.ids]  # type: ignore[index]  # those of the model are integers
            rows = [dice.randint(1, n) for n in its] if dice.random() < 0.1 else None
            cut = [dice.randint(1, n) for n in its] if rows is None and dice.random() < 0.1 else None
            self.packs.pack(self.ids, Asked(rows, cut, dice.choice(MODELS)))


@pytest.mark.parametrize("seed", range(20))
def test_packs_are_right_through_random_lives(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_forests(monkeypatch)
    random_life(seed, 300, PackingWorld)
    assert made["changed"] > made["built"]


def same_tokens(num_sequences: int) -> tuple[PrefixCache, list[Hashable], Packs]:
    """Sequences that have computed the same prompt side by side, each on pages of its own."""
    cache, ids = PrefixCache(PageAllocator(64, 2)), list(range(num_sequences))
    for seq_id in ids:
        cache.start(seq_id, [1, 2, 3, 4, 5 + seq_id])
    packs = Packs(cache.descriptor, cache.pack_hybrid_for_flashinfer)
    return cache, list(ids), packs


def test_pages_that_are_adopted_are_shared_from_then_on() -> None:
    cache, ids, packs = same_tokens(3)
    assert len(packs.pack(ids, Asked()).levels) == 1
    for seq_id in ids:
        cache.publish(seq_id)
    assert len(packs.pack(ids, Asked()).levels) == 2


def test_pages_that_a_fork_adopts_with_its_parent_are_the_new_ones() -> None:
    cache, ids, packs = same_tokens(2)
    cache.fork(0, "fork")
    ids.append("fork")
    packs.pack(ids, Asked())
    cache.publish(1)
    packs.pack(ids, Asked())
    cache.publish(0)
    assert len(packs.pack(ids, Asked()).levels) == 2


def test_a_decoding_batch_has_its_shared_levels_as_the_same_objects() -> None:
    cache = PrefixCache(PageAllocator(200, 2))
    cache.start("prompt", list(range(20)))
    cache.finish("prompt")
    ids: list[Hashable] = list(range(5))
    for i in range(5):
        cache.start(i, [*range(20), 50 + i, 60 + i])
    packs = Packs(cache.descriptor, cache.pack_hybrid_for_flashinfer)
    first = packs.pack(ids, Asked())
    for token in range(12):
        cache.extend(ids, [token] * 5)
        assert packs.pack(ids, Asked()).levels[0] is first.levels[0]
        if token % 5 == 0:
            cache.publish(token % 3)
