"""Random lives of a descriptor against a slow model, over memory that remembers what was written where.

The model is a table of token lists and page tables. Every token is a number of its own, so a slot that was overwritten,
copied too early or not copied at all shows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seqattn.descriptor import CacheDescriptor
from seqattn.errors import NoPageError
from tests.radix.fake_kv import FakeKV, ref_counts


@dataclass
class Row:
    """One sequence of the model."""

    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class Desk:
    """A descriptor and its model, driven together; every call compares all of both."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.memory = FakeKV(num_pages, page_size)
        self.descriptor = CacheDescriptor(self.memory)
        self.rows: dict[int, Row] = {}
        self.by_hand: list[int] = []
        self.num_tokens_made = 0

    # -- the model ----------------------------------------------------------------------------------------------------

    def counts(self) -> Counter[int]:
        return Counter([*self.by_hand, *(page for row in self.rows.values() for page in row.pages)])

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.memory.page_size)

    def is_cut_and_shared(self, row: Row) -> bool:
        return len(row.tokens) % self.memory.page_size > 0 and self.counts()[row.pages[-1]] > 1

    def num_pages_to_grow(self, lens: dict[int, int]) -> int:
        rows = [(self.rows.get(seq_id, Row()), new) for seq_id, new in lens.items()]
        added = sum(self.pages_for(len(row.tokens) + new) - len(row.pages) for row, new in rows)
        return added + sum(self.is_cut_and_shared(row) for row, _ in rows)

    # -- both ---------------------------------------------------------------------------------------------------------

    def grow(self, lens: dict[int, int], call: Callable[[], None]) -> bool:
        """A call that appends `lens[seq_id]` tokens to each sequence; False if it raised for want of pages."""
        needed = self.num_pages_to_grow(lens)
        if not self.runs(needed, call):
            return False
        free = set(range(self.memory.num_pages)) - set(self.counts())
        copied = [seq_id for seq_id in lens if seq_id in self.rows and self.is_cut_and_shared(self.rows[seq_id])]
        for seq_id, new in lens.items():
            self.grow_row(self.rows.setdefault(seq_id, Row()), new, seq_id, seq_id in copied, free)
        self.assert_equal()
        return True

    def grow_row(self, row: Row, num_new: int, seq_id: int, is_copied: bool, free: set[int]) -> None:
        table, start = self.descriptor.seq_id_to_data[seq_id].kv_page_indices, len(row.tokens)
        if is_copied:
            row.pages.pop()
        added = table[len(row.pages) :]
        assert table[: len(row.pages)] == row.pages
        assert len(set(added)) == len(added)
        assert set(added) <= free
        free -= set(added)
        row.pages += added
        row.tokens += range(self.num_tokens_made, self.num_tokens_made + num_new)
        self.num_tokens_made += num_new
        self.memory.compute(row.pages, None, row.tokens, start, len(row.tokens))

    def runs(self, needed: int, call: Callable[[], None]) -> bool:
        """Makes the call; if too few pages are free it must raise, and nothing may change."""
        free = self.memory.num_pages - len(self.counts())
        if needed <= free:
            call()
            return True
        stack = self.memory.free_pages.tolist()
        with pytest.raises(NoPageError) as error:
            call()
        assert (error.value.needed, error.value.available) == (needed, free)
        assert self.memory.free_pages.tolist() == stack
        self.assert_equal()
        return False

    def fork(self, parent: int, child: int) -> None:
        row = self.rows[parent]
        num_whole = len(row.tokens) // self.memory.page_size
        if self.runs(len(row.pages) - num_whole, lambda: self.descriptor.fork(parent, child)):
            table = self.descriptor.seq_id_to_data[child].kv_page_indices
            assert table[:num_whole] == row.pages[:num_whole]
            assert not set(table[num_whole:]) & set(self.counts())
            self.rows[child] = Row(list(row.tokens), table)
            self.assert_equal()

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        self.descriptor.truncate(seq_id, num_tokens)
        row = self.rows[seq_id]
        del row.tokens[num_tokens:]
        del row.pages[self.pages_for(num_tokens) :]
        self.assert_equal()

    def release(self, seq_ids: Sequence[int]) -> None:
        self.descriptor.release(seq_ids)
        for seq_id in seq_ids:
            del self.rows[seq_id]
        self.assert_equal()

    def attach(self, source: int, new_id: int, num_tokens: int, *, keep: bool) -> None:
        """A new sequence over the first pages of another, by references taken by hand; `keep` keeps a second one."""
        row = self.rows[source]
        pages = row.pages[: self.pages_for(num_tokens)]
        self.memory.ref(pages)
        if keep:
            self.memory.ref(pages)
            self.by_hand += pages
        self.descriptor.attach(new_id, pages, num_tokens)
        self.rows[new_id] = Row(row.tokens[:num_tokens], pages)
        self.assert_equal()

    def take_by_hand(self, num_pages: int) -> None:
        def call() -> None:
            self.by_hand += self.memory.allocate(num_pages).tolist()

        if self.runs(num_pages, call):
            self.assert_equal()

    def let_go_by_hand(self) -> None:
        self.memory.unref(self.by_hand)
        self.by_hand.clear()
        self.assert_equal()

    def assert_equal(self) -> None:
        found = self.descriptor.seq_id_to_data
        assert {seq_id: data.kv_page_indices for seq_id, data in found.items()} == {
            seq_id: row.pages for seq_id, row in self.rows.items()
        }
        for seq_id, row in self.rows.items():
            assert self.descriptor.num_tokens(seq_id) == len(row.tokens)
            assert len(row.pages) == self.pages_for(len(row.tokens))
            self.memory.assert_right(row.pages, None, row.tokens, len(row.tokens))
        assert ref_counts(self.memory) == dict(self.counts())
        assert self.memory.num_outside_refs == len(self.by_hand)
        self.descriptor.check()

    def assert_packs(self) -> None:
        """B3: the packed arrays unpack to the page tables."""
        packed = self.descriptor.pack_for_flashinfer(list(self.rows))
        indptr, indices = packed.kv_page_indptr.tolist(), packed.kv_page_indices.tolist()
        assert len(indptr) == len(self.rows) + 1
        for index, row in enumerate(self.rows.values()):
            assert indices[indptr[index] : indptr[index + 1]] == row.pages
            past = (len(row.pages) - 1) * self.memory.page_size
            assert packed.kv_last_page_len[index] == (len(row.tokens) - past if row.pages else 0)

    def end(self) -> None:
        """M4: everything released, every page is free."""
        self.release(list(self.rows))
        self.let_go_by_hand()
        assert self.memory.available_pages_count == self.memory.num_pages


class DescriptorMachine(RuleBasedStateMachine):
    """Lives drawn by Hypothesis, which shrinks those that fail."""

    desk: Desk

    @initialize(page_size=st.sampled_from([1, 2, 16]), num_pages=st.integers(1, 8))
    def begin(self, page_size: int, num_pages: int) -> None:
        self.desk = Desk(num_pages, page_size)

    def some(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.desk.rows)), label="sequence")

    def length(self, data: st.DataObject) -> int:
        return data.draw(st.integers(1, 3 * self.desk.memory.page_size), label="tokens")

    def cut(self, data: st.DataObject, seq_id: int, least: int = 0) -> int:
        return data.draw(st.integers(least, len(self.desk.rows[seq_id].tokens)), label="kept")

    @rule(data=st.data(), seq_ids=st.lists(st.integers(0, 5), max_size=3, unique=True))
    def allocate(self, data: st.DataObject, seq_ids: list[int]) -> None:
        lens = {seq_id: self.length(data) for seq_id in seq_ids}
        self.desk.grow(lens, lambda: self.desk.descriptor.allocate(seq_ids, list(lens.values())))

    @precondition(lambda self: self.desk.rows)
    @rule(data=st.data())
    def allocate_decoding(self, data: st.DataObject) -> None:
        seq_ids = data.draw(st.lists(st.sampled_from(sorted(self.desk.rows)), unique=True))
        self.desk.grow(dict.fromkeys(seq_ids, 1), lambda: self.desk.descriptor.allocate_decoding(seq_ids))

    @precondition(lambda self: self.desk.rows)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        seq_id, length = self.some(data), self.length(data)
        self.desk.grow({seq_id: length}, lambda: self.desk.descriptor.extend(seq_id, length))

    @precondition(lambda self: self.desk.rows)
    @rule(data=st.data(), child=st.integers(0, 5))
    def fork(self, data: st.DataObject, child: int) -> None:
        if child not in self.desk.rows:
            self.desk.fork(self.some(data), child)

    @precondition(lambda self: self.desk.rows)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq_id = self.some(data)
        self.desk.truncate(seq_id, self.cut(data, seq_id))

    @precondition(lambda self: self.desk.rows)
    @rule(data=st.data(), child=st.integers(0, 5), keep=st.booleans())
    def attach(self, data: st.DataObject, child: int, keep: bool) -> None:
        if child not in self.desk.rows:
            source = self.some(data)
            self.desk.attach(source, child, self.cut(data, source), keep=keep)

    @precondition(lambda self: self.desk.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.desk.release(data.draw(st.lists(st.sampled_from(sorted(self.desk.rows)), unique=True)))

    @rule(num_pages=st.integers(0, 3))
    def take_by_hand(self, num_pages: int) -> None:
        self.desk.take_by_hand(num_pages)

    @rule()
    def let_go_by_hand(self) -> None:
        self.desk.let_go_by_hand()

    @invariant()
    def packs_to_its_tables(self) -> None:
        if hasattr(self, "desk"):
            self.desk.assert_packs()

    def teardown(self) -> None:
        if hasattr(self, "desk"):
            self.desk.end()


TestDescriptorMachine = DescriptorMachine.TestCase


def random_life(seed: int, num_steps: int) -> Counter[str]:
    """A seeded life of a descriptor; returns how often each call was made, and how often one was short of pages."""
    rng = random.Random(seed)
    desk = Desk(rng.randint(1, 10), rng.choice([1, 2, 16]))
    made: Counter[str] = Counter()
    for _ in range(num_steps):
        made[random_step(rng, desk)] += 1
    desk.assert_packs()
    desk.end()
    return made


def random_step(rng: random.Random, desk: Desk) -> str:
    """One call, drawn; returns its name."""
    unused = sorted(set(range(6)) - set(desk.rows))
    size = desk.memory.page_size
    if not desk.rows or (unused and rng.random() < 0.15):
        lens = {seq_id: rng.randint(1, 2 * size) for seq_id in rng.sample(range(6), rng.randint(1, 3))}
        done = desk.grow(lens, lambda: desk.descriptor.allocate(list(lens), list(lens.values())))
        return "allocate" if done else "short"
    seq_id = rng.choice(sorted(desk.rows))
    cut = rng.randint(0, len(desk.rows[seq_id].tokens))
    calls: dict[str, Callable[[], Any]] = {
        "extend": lambda: desk.grow({seq_id: 1 + cut}, lambda: desk.descriptor.extend(seq_id, 1 + cut)),
        "decode": lambda: desk.grow(
            dict.fromkeys(desk.rows, 1), lambda: desk.descriptor.allocate_decoding(list(desk.rows))
        ),
        "truncate": lambda: desk.truncate(seq_id, cut),
        "release": lambda: desk.release([seq_id]),
        "by hand": lambda: desk.let_go_by_hand() if desk.by_hand else desk.take_by_hand(rng.randint(0, 2)),
    }
    if unused:
        calls["fork"] = lambda: desk.fork(seq_id, unused[0])
        calls["attach"] = lambda: desk.attach(seq_id, unused[0], cut, keep=rng.random() < 0.2)
    name = rng.choice(sorted(calls))
    return "short" if calls[name]() is False else name


@pytest.mark.parametrize("seed", range(20))
def test_a_random_life_agrees_with_the_model(seed: int) -> None:
    random_life(seed, 150)


def test_random_lives_make_every_call_and_run_short_of_pages() -> None:
    made = sum((random_life(seed, 100) for seed in range(100, 110)), Counter())
    assert min(made[name] for name in ("allocate", "extend", "decode", "truncate", "release", "fork", "attach")) > 10
    assert made["short"] > 10
