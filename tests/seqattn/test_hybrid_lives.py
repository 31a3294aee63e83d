"""Hybrid batches are packed right through random lives of a descriptor, and from what was known where that is right."""

from __future__ import annotations

import random
from collections.abc import Hashable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from seqattn import CacheDescriptor, CostModel, NoPageError, PageAllocator
from tests.seqattn.packs import MODELS, Asked, Packs, count_forests, reuse_whatever_changes


@pytest.fixture(autouse=True)
def reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    reuse_whatever_changes(monkeypatch)


class PackingMachine(RuleBasedStateMachine):
    """A descriptor over few pages, so that those given back come again in other tables."""

    @initialize(page_size=st.sampled_from([1, 2, 4]), num_pages=st.integers(8, 40))
    def begin(self, page_size: int, num_pages: int) -> None:
        self.descriptor = CacheDescriptor(PageAllocator(num_pages, page_size))
        self.packs = Packs(self.descriptor)
        self.ids: list[Hashable] = []

    @property
    def running(self) -> list[Any]:
        return list(self.descriptor.seq_id_to_data)

    def some(self, data: st.DataObject) -> Any:  # noqa: ANN401  an id
        return data.draw(st.sampled_from(self.running), label="sequence")

    @rule(seq_ids=st.lists(st.integers(0, 9), max_size=3, unique=True), length=st.integers(1, 9))
    def allocate(self, seq_ids: list[int], length: int) -> None:
        self.try_to(lambda: self.descriptor.allocate(seq_ids, [length] * len(seq_ids)))

    @precondition(lambda self: self.running)
    @rule()
    def decode(self) -> None:
        self.try_to(lambda: self.descriptor.allocate_decoding(self.running))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), child=st.integers(0, 9))
    def fork(self, data: st.DataObject, child: int) -> None:
        if child not in self.running:
            parent = self.some(data)
            self.try_to(lambda: self.descriptor.fork(parent, child))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.integers(0, 6))
    def cut(self, data: st.DataObject, more: int) -> None:
        """And often grown again: a last page that is shared is copied then."""
        seq_id = self.some(data)
        self.descriptor.truncate(seq_id, data.draw(st.integers(0, self.descriptor.num_tokens(seq_id)), label="kept"))
        if more:
            self.try_to(lambda: self.descriptor.extend(seq_id, more))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), child=st.integers(0, 9))
    def attach(self, data: st.DataObject, child: int) -> None:
        if child not in self.running:
            source = self.descriptor.data_of(self.some(data))
            count = data.draw(st.integers(0, source.num_pages), label="pages")
            pages = source.kv_page_indices[:count]
            self.descriptor.cache_manager.ref(pages)
            full = count * self.descriptor.page_size
            self.descriptor.attach(
                child, pages, full - (count > 0) * data.draw(st.integers(0, self.descriptor.page_size - 1))
            )

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.descriptor.release([self.some(data)])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), model=st.sampled_from(MODELS), again=st.booleans(), cut=st.booleans(), rows=st.booleans())
    def pack(self, data: st.DataObject, model: CostModel | None, again: bool, cut: bool, rows: bool) -> None:
        """Mostly the batch before, as far as it is still there."""
        lens = {seq_id: self.descriptor.num_tokens(seq_id) for seq_id in self.running}
        here = [seq_id for seq_id, length in lens.items() if length]
        if not again or not set(self.ids) & set(here):
            self.ids = data.draw(st.lists(st.sampled_from(here), unique=True), label="batch") if here else []
        self.ids = [seq_id for seq_id in self.ids if seq_id in here]
        num_tokens = [data.draw(st.integers(1, lens[seq_id])) for seq_id in self.ids] if cut else None
        least = num_tokens or [lens[seq_id] for seq_id in self.ids]
        query_lens = [data.draw(st.integers(1, length)) for length in least] if rows else None
        self.packs.pack(self.ids, Asked(query_lens, num_tokens, model))

    def try_to(self, call: Any) -> None:  # noqa: ANN401  any call
        with suppress(NoPageError):
            call()


TestPackingMachine = PackingMachine.TestCase


class Life:
    """A life drawn from a seed: one batch that decodes, changed by few, as a server has it."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.descriptor = CacheDescriptor(PageAllocator(20_000, self.dice.choice([1, 2, 4])))
        self.packs = Packs(self.descriptor)
        self.ids: list[Hashable] = []
        self.num_started = 0
        self.descriptor.allocate(["a", "b", "c"], [40, 23, 8])
        self.descriptor.fork("a", "ab")
        self.descriptor.extend("ab", 17)
        for _ in range(12):
            self.join()

    def join(self) -> None:
        self.num_started += 1
        parent = self.dice.choice(["a", "a", "b", "c", "ab", *self.ids])
        self.descriptor.fork(parent, self.num_started)
        if self.dice.random() < 0.5:
            self.descriptor.truncate(self.num_started, self.dice.randint(1, self.descriptor.num_tokens(parent)))
        self.descriptor.extend(self.num_started, self.dice.randint(1, 6))
        self.ids.insert(self.dice.randint(0, len(self.ids)), self.num_started)

    def leave(self) -> None:
        self.descriptor.release([self.ids.pop(self.dice.randrange(len(self.ids)))])

    def step(self) -> None:
        """A step of decoding, and now and then something else."""
        kind = self.dice.randrange(12)
        if kind < 2 and len(self.ids) < 16:
            self.join()
        elif kind < 4 and len(self.ids) > 6:
            self.leave()
        elif kind == 4:
            self.dice.shuffle(self.ids)
        elif kind == 5:
            seq_id = self.dice.choice(self.ids)
            self.descriptor.truncate(seq_id, self.dice.randint(1, self.descriptor.num_tokens(seq_id)))
        self.descriptor.allocate_decoding(self.ids)

    def asked(self) -> Asked:
        lens = [self.descriptor.num_tokens(seq_id) for seq_id in self.ids]
        rows = [self.dice.randint(1, min(n, 9)) for n in lens] if self.dice.random() < 0.1 else None
        cut = [self.dice.randint(1, n) for n in lens] if rows is None and self.dice.random() < 0.1 else None
        model = self.dice.choice(MODELS) if self.dice.random() < 0.2 else MODELS[1]
        return Asked(rows, cut, model)


@pytest.mark.parametrize("seed", range(8))
def test_packs_are_right_through_random_lives_and_reused(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_forests(monkeypatch)
    life = Life(seed)
    for _ in range(100):
        life.step()
        life.packs.pack(life.ids, life.asked())
        if len(life.ids) > 6 and life.dice.random() < 0.1:  # another batch in between
            life.packs.pack(life.ids[2:], Asked())
    assert life.packs.num_reused > 5
    assert life.packs.num_changed > 20
    assert made["built"] < 10 < made["changed"]


@pytest.mark.parametrize("seed", range(6))
def test_long_lists_are_right_through_random_lives(seed: int) -> None:
    """Now and then one sequence gets much longer than the others, or is cut back."""
    life = Life(seed)
    for _ in range(100):
        life.step()
        if life.dice.random() < 0.2:
            life.descriptor.extend(life.dice.choice(life.ids), life.dice.randint(150, 400))
        lens = [life.descriptor.num_tokens(seq_id) for seq_id in life.ids]
        cut = [life.dice.randint(max(1, n - 40), n) for n in lens] if life.dice.random() < 0.3 else None
        life.packs.pack(life.ids, Asked(num_tokens=cut, model=MODELS[-1]))
    assert life.packs.num_cut > 10
