"""Lives of a `PrefixCache` drawn by Hypothesis, which shrinks those that fail; seeded random ones follow.

Every rule makes one call on a `World`, which compares the cache with its model: M1 to M4, the balance of references,
`check()`, and that a call that fails leaves everything as it was.
"""

from __future__ import annotations

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.radix.driver import assert_lives
from tests.radix.lives import Tokens, described, parsed
from tests.radix.world import World

IDS = st.integers(0, 4)
SLOTS = st.integers(0, 2)
NAMESPACES = st.sampled_from([None, None, None, "b"])
UNCACHED = st.sampled_from([1, 1, 1, 0, 2])


def prompts(page_size: int) -> st.SearchStrategy[Tokens]:
    """Runs of equal tokens of two kinds, as long as a page, a bit less or a bit more: they collide all the time."""
    lengths = sorted({1, max(1, page_size - 1), page_size, page_size + 1})
    runs = st.tuples(st.sampled_from([0, 1]), st.sampled_from(lengths))
    return st.lists(runs, min_size=1, max_size=5).map(lambda found: sum(((t,) * n for t, n in found), Tokens()))


class PrefixCacheMachine(RuleBasedStateMachine):
    """One cache and its model."""

    world: World

    @initialize(
        page_size=st.sampled_from([1, 2, 16]),
        num_pages=st.integers(1, 9),
        whole_pages=st.sampled_from([False, False, True]),
    )
    def begin(self, page_size: int, num_pages: int, whole_pages: bool) -> None:
        self.world = World(num_pages, page_size, whole_pages=whole_pages)

    def tokens(self, data: st.DataObject) -> Tokens:
        return data.draw(prompts(self.world.model.page_size), label="tokens")

    def running(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.world.model.running)), label="sequence")

    def length(self, data: st.DataObject, seq_id: int) -> int:
        return data.draw(st.integers(0, len(self.world.model.running[seq_id].tokens)), label="length")

    def length_or_none(self, data: st.DataObject, seq_id: int) -> int | None:
        return self.length(data, seq_id) if data.draw(st.booleans(), label="with a length") else None

    def do(self, *call: object) -> None:
        note(described(call))
        self.world.do(call)

    @rule(data=st.data(), seq_id=IDS, namespace=NAMESPACES, uncached=UNCACHED)
    def start(self, data: st.DataObject, seq_id: int, namespace: str | None, uncached: int) -> None:
        self.do("start", seq_id, self.tokens(data), namespace, uncached)

    @rule(data=st.data(), seq_ids=st.lists(IDS, max_size=3, unique=True), uncached=UNCACHED)
    def start_many(self, data: st.DataObject, seq_ids: list[int], uncached: int) -> None:
        items = [(seq_id, self.tokens(data), data.draw(NAMESPACES, label="namespace")) for seq_id in seq_ids]
        self.do("start_many", tuple(items), uncached)

    @precondition(lambda self: self.world.model.running)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        seq_ids = data.draw(st.lists(st.sampled_from(sorted(self.world.model.running)), unique=True, max_size=3))
        self.do("extend", tuple((seq_id, self.tokens(data)) for seq_id in seq_ids))

    @precondition(lambda self: self.world.model.running)
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        self.do("extend", ((self.running(data), (data.draw(st.sampled_from([0, 1]), label="token"),)),))

    @precondition(lambda self: self.world.model.running)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        self.do("compute", self.running(data))

    @precondition(lambda self: self.world.model.running)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        seq_id = self.running(data)
        self.do("publish", seq_id, self.length_or_none(data, seq_id))

    @precondition(lambda self: self.world.model.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        seq_id = self.running(data)
        self.do("finish", seq_id, self.length_or_none(data, seq_id))

    @precondition(lambda self: self.world.model.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.do("abort", self.running(data))

    @precondition(lambda self: self.world.model.running)
    @rule(data=st.data(), new_seq_id=IDS)
    def fork(self, data: st.DataObject, new_seq_id: int) -> None:
        self.do("fork", self.running(data), new_seq_id)

    @precondition(lambda self: self.world.model.running)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq_id = self.running(data)
        self.do("truncate", seq_id, self.length(data, seq_id))

    @rule(data=st.data(), slot=SLOTS, namespace=NAMESPACES)
    def pin(self, data: st.DataObject, slot: int, namespace: str | None) -> None:
        self.do("pin", slot, self.tokens(data), namespace)

    @rule(slot=SLOTS)
    def unpin(self, slot: int) -> None:
        self.do("unpin", slot)

    @rule(data=st.data(), slot=SLOTS, namespace=NAMESPACES)
    def hold_by_hand(self, data: st.DataObject, slot: int, namespace: str | None) -> None:
        self.do("hold", slot, self.tokens(data), namespace)

    @rule(slot=SLOTS, num_pages=st.integers(0, 2))
    def take_by_hand(self, slot: int, num_pages: int) -> None:
        self.do("take", slot, num_pages)

    @rule(slot=SLOTS)
    def let_go_by_hand(self, slot: int) -> None:
        self.do("let_go", slot)

    @rule(num_pages=st.integers(0, 3))
    def evict(self, num_pages: int) -> None:
        self.do("evict", num_pages)

    @precondition(lambda self: self.world.model.entries)
    @rule(data=st.data())
    def demote(self, data: st.DataObject) -> None:
        namespace, tokens = data.draw(st.sampled_from(list(self.world.model.entries)), label="cached")
        self.do("demote", data.draw(st.integers(0, len(tokens)), label="after"), tokens, namespace)

    @rule(data=st.data(), namespace=NAMESPACES)
    def match(self, data: st.DataObject, namespace: str | None) -> None:
        self.do("match", self.tokens(data), namespace)

    @rule()
    def clear(self) -> None:
        self.do("clear")

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=40)


@pytest.mark.parametrize("first", range(0, 120, 10))
def test_random_lives_agree_with_the_model(first: int) -> None:
    """120 lives of 170 calls: 20,400 steps, the same on every run."""
    assert_lives(first, 10, 170)


def test_random_lives_come_everywhere() -> None:
    """Pages run short, are evicted and pinned, and every call is made: or else agreement would mean little."""
    made = assert_lives(0, 20, 170)
    rare = {
        name: count for name, count in made.items() if count < 20 and name not in ("clear", "hold", "take", "let_go")
    }
    assert not rare
    assert made["short"] > 200
    assert made["evicted"] > 200


def test_a_life_reads_as_it_is_written() -> None:
    life = (
        "start 0 [5,6,7] in b · start_many 0 [1] 1 [2,3] in b uncached 0 · extend 0 [8] 1 [2,3] · publish 0 · "
        "finish 0 3 · match [] in b · pin 0 [1] · unpin 0 · hold 1 [2] · evict 2 · fork 0 1 · truncate 1 2 · "
        "demote 2 [5,6,7] · clear"
    )
    assert " · ".join(described(call) for call in parsed(life)) == life
