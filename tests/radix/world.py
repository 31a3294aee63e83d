"""A `PrefixCache` and its model, driven together; after each call everything that can be seen of them is compared.

A call is a tuple, its name first, so that lives can be drawn, written down, replayed and shrunk:

    ("start", 0, (5, 6, 7), None, 1)      ("finish", 0, 3)      ("evict", 2)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from radix.cache import PrefixCache
from seqattn.errors import NoPageError, PromptTooLargeError
from tests.radix.fake_kv import FakeKV, ref_counts
from tests.radix.lives import Call, Item, Tokens, described, parsed
from tests.radix.model import Model
from tests.radix.state import entries, newest, snapshot, tables
from tests.radix.tables import Outcome, Short

if TYPE_CHECKING:
    from radix.running import PrefixMatch, Started


@dataclass
class Counts:
    """What `stats` must say."""

    num_query_tokens: int = 0
    num_hit_tokens: int = 0
    num_shared_pages: int = 0
    num_forked_pages: int = 0
    aborted: dict[int, tuple[Hashable, Tokens]] = field(default_factory=dict)


class World:
    """Makes calls on a cache and its model; raises AssertionError where they differ.

    Args:
        num_pages, page_size, whole_pages: as of the cache.
        cache_class, memory: what to test in place of `PrefixCache` and a `FakeKV`.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        whole_pages: bool = False,
        cache_class: type[PrefixCache] = PrefixCache,
        memory: FakeKV | None = None,
    ) -> None:
        self.memory = memory or FakeKV(num_pages, page_size)
        self.cache = cache_class(self.memory, whole_pages=whole_pages)
        self.model = Model(num_pages, page_size, whole_pages)
        self.pins: dict[int, AbstractContextManager[PrefixMatch]] = {}
        self.prompts: dict[int, Tokens] = {}
        self.counts = Counts()
        self.life: list[str] = []
        self.num_short = 0

    def live(self, life: str) -> World:
        """Makes the calls of a life, each of which must apply; returns itself."""
        for call in parsed(life):
            assert self.do(call), f"{described(call)} does not apply"
        return self

    def do(self, call: Call) -> bool:
        """Makes one call on both and compares them; False if it makes no sense here, as on an unknown sequence."""
        if not self.applies(call):
            return False
        self.life.append(described(call))
        getattr(self, call[0])(*call[1:])
        self.compare()
        return True

    def applies(self, call: Call) -> bool:
        """Sequences to be named are running, those to be started are not, and so on."""
        name, running = call[0], self.model.running
        if name in ("start", "start_many"):
            seq_ids = [item[0] for item in call[1]] if name == "start_many" else [call[1]]
            return len(set(seq_ids)) == len(seq_ids) and not any(seq_id in running for seq_id in seq_ids)
        if name == "extend":
            return len(dict(call[1])) == len(call[1]) and all(seq_id in running for seq_id, _ in call[1])
        if name in ("pin", "unpin"):
            return bool((call[1] in self.pins) == (name == "unpin"))
        if name in ("hold", "take", "let_go"):
            return bool((call[1] in self.model.by_hand) == (name == "let_go"))
        is_new_free = name != "fork" or call[2] not in running
        return name in ("evict", "demote", "clear", "match") or (call[1] in running and is_new_free)

    # -- starting -----------------------------------------------------------------------------------------------------

    def start(self, seq_id: int, tokens: Tokens, namespace: Hashable, min_uncached: int) -> None:
        would_fit = not isinstance(self.model.plan([(namespace, tokens)], 1), Short)
        assert self.cache.can_start(tokens, namespace=namespace) == would_fit, "can_start is wrong"

        def call() -> list[Started]:
            return [self.cache.start(seq_id, tokens, namespace=namespace, min_uncached_tokens=min_uncached)]

        self._start(((seq_id, tokens, namespace),), min_uncached, call)

    def start_many(self, items: tuple[Item, ...], min_uncached: int) -> None:
        def call() -> list[Started]:
            return self.cache.start_many(
                [seq_id for seq_id, _, _ in items],
                [tokens for _, tokens, _ in items],
                namespaces=[namespace for _, _, namespace in items],
                min_uncached_tokens=min_uncached,
            )

        self._start(items, min_uncached, call)

    def _start(self, items: tuple[Item, ...], min_uncached: int, call: Callable[[], list[Started]]) -> None:
        prompts = [(namespace, tokens) for _, tokens, namespace in items]
        plans = self.model.plan(prompts, min_uncached)
        if isinstance(plans, Short):
            self.must_be_short(plans, call)
            return
        num_copies = self.memory.num_copies
        started = call()
        seq_ids, now = [seq_id for seq_id, _, _ in items], tables(self.cache)
        outcomes = [
            Outcome(s.num_cached_tokens, s.num_shared_pages, s.forked, now[seq_id])
            for seq_id, s in zip(seq_ids, started, strict=True)
        ]
        assert self.memory.num_copies - num_copies == any(outcome.forked for outcome in outcomes), "one copy for all"
        self.model.start(seq_ids, prompts, plans, outcomes)
        for item, outcome in zip(items, outcomes, strict=True):
            self._count_start(*item, outcome)

    def _count_start(self, seq_id: int, tokens: Tokens, namespace: Hashable, outcome: Outcome) -> None:
        self.prompts[seq_id] = tokens
        if self.is_retry(seq_id, tokens, namespace):
            return
        self.counts.num_query_tokens += len(tokens)
        self.counts.num_hit_tokens += outcome.num_cached
        self.counts.num_shared_pages += outcome.num_shared
        self.counts.num_forked_pages += outcome.forked is not None

    def is_retry(self, seq_id: int, tokens: Tokens, namespace: Hashable) -> bool:
        """A request that comes again after `abort`, perhaps with more tokens, counts once."""
        there, prompt = self.counts.aborted.pop(seq_id, (None, ()))
        return there == namespace and bool(prompt) and tokens[: len(prompt)] == prompt

    def must_be_short(self, short: Short, call: Callable[[], object]) -> None:
        """The call must raise `NoPageError` with these numbers, and change nothing."""
        before = snapshot(self.cache)
        with pytest.raises(PromptTooLargeError if short.is_too_large else NoPageError) as raised:
            call()
        found = (raised.value.needed, raised.value.available)
        assert found == (short.needed, short.available), f"{raised.value}, not {short}"
        assert snapshot(self.cache) == before, "a call that failed left a trace"
        self.num_short += 1

    # -- running sequences --------------------------------------------------------------------------------------------

    def extend(self, items: tuple[tuple[int, Tokens], ...]) -> None:
        chunks = dict(items)
        needed = self.model.plan_extend(chunks)
        # Some last tokens are not known yet, and said afterwards.
        unknown = {seq_id: chunk[-1] for seq_id, chunk in items if sum(chunk) % 3 == 0}

        def call() -> None:
            given = [(seq_id, (*chunk[:-1], 99) if seq_id in unknown else chunk) for seq_id, chunk in items]
            # A single id goes in as it is, or as an array of one.
            token_ids = [chunk[0] if len(chunk) == 1 and seq_id % 2 else chunk for seq_id, chunk in given]
            self.cache.extend([seq_id for seq_id, _ in items], token_ids)
            self.cache.amend(list(unknown), list(unknown.values()))

        if isinstance(needed, Short):
            self.must_be_short(needed, call)
            return
        self.counts.num_forked_pages += sum(self.model.needs_copy(seq_id) for seq_id in chunks)
        call()
        self.model.extend(chunks, tables(self.cache))

    def compute(self, seq_id: int) -> None:
        """What the model does: write the KV of all tokens that have none."""
        sequence = self.model.running[seq_id]
        start, stop = sequence.num_written, len(sequence.tokens)
        self.memory.compute(sequence.pages, sequence.namespace, sequence.tokens, start, stop)
        sequence.num_written = stop

    def fork(self, seq_id: int, new_seq_id: int) -> None:
        self.compute(seq_id)
        needed = self.model.num_pages_to_fork(seq_id)
        available = len(self.model.free_pages()) + len(self.model.idle_pages())
        if needed > available:
            self.must_be_short(Short(needed, available), lambda: self.cache.fork(seq_id, new_seq_id))
            return
        self.cache.fork(seq_id, new_seq_id)
        self.counts.num_forked_pages += needed
        self.model.fork(seq_id, new_seq_id, tables(self.cache)[new_seq_id])
        self.prompts[new_seq_id] = ()  # no request of its own

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        num_tokens = min(num_tokens, len(self.model.running[seq_id].tokens))
        self.cache.truncate(seq_id, num_tokens)
        self.model.truncate(seq_id, num_tokens)

    def publish(self, seq_id: int, num_tokens: int | None) -> None:
        num_tokens, written = self._written(seq_id, num_tokens)
        self.cache.publish(seq_id, num_tokens=num_tokens)
        self.model.publish(seq_id, written, with_tail=False, latest=self._latest)

    def finish(self, seq_id: int, num_tokens: int | None) -> None:
        num_tokens, written = self._written(seq_id, num_tokens)
        self.cache.finish(seq_id, num_tokens=num_tokens)
        self.model.publish(seq_id, written, with_tail=True, latest=self._latest)
        self.model.let_go(seq_id)

    def _written(self, seq_id: int, num_tokens: int | None) -> tuple[int | None, int]:
        """The number of tokens to name, at most those whose KV exists, and what it amounts to; None computes all."""
        if num_tokens is None:
            self.compute(seq_id)
            return None, self.model.running[seq_id].num_written
        num_tokens = min(num_tokens, self.model.running[seq_id].num_written)
        return num_tokens, num_tokens

    def _latest(self, pages: set[int]) -> int:
        return newest(self.cache.tree, pages)

    def abort(self, seq_id: int) -> None:
        self.cache.abort(seq_id)
        self.counts.aborted.pop(seq_id, None)
        if self.prompts[seq_id]:
            self.counts.aborted[seq_id] = (self.model.running[seq_id].namespace, self.prompts[seq_id])
        self.model.let_go(seq_id)

    # -- the rest -----------------------------------------------------------------------------------------------------

    def match(self, tokens: Tokens, namespace: Hashable) -> None:
        self.agrees(self.cache.match(tokens, namespace=namespace), tokens, namespace)

    def agrees(self, found: PrefixMatch, tokens: Tokens, namespace: Hashable) -> list[int]:
        """The match is the longest common prefix; returns all of its pages, a partial one included."""
        truth, size = self.model.match(namespace, tokens), self.model.page_size
        pages = [int(page) for page in found.pages]
        assert found.num_tokens == truth.num_cached, f"matched {found}, not {truth}"
        assert pages == truth.shared, f"matched {found}, not {truth}"
        assert found.tail_len == truth.num_cached % size, f"matched {found}, not {truth}"
        if not truth.sources:
            assert found.tail_page is None, f"matched {found}, not {truth}"
            return pages
        assert found.tail_page in truth.sources, f"matched {found}, not {truth}"
        return [*pages, int(found.tail_page)]

    def pin(self, pin_id: int, tokens: Tokens, namespace: Hashable) -> None:
        self.pins[pin_id] = self.cache.pin(tokens, namespace=namespace)
        self.model.pins[pin_id] = self.agrees(self.pins[pin_id].__enter__(), tokens, namespace)

    def unpin(self, pin_id: int) -> None:
        self.pins.pop(pin_id).__exit__(None, None, None)
        self.model.use(self.model.pins.pop(pin_id))

    def hold(self, hold_id: int, tokens: Tokens, namespace: Hashable) -> None:
        """Somebody outside takes references to all that matches, by hand."""
        pages = self.agrees(self.cache.match(tokens, namespace=namespace), tokens, namespace)
        self.memory.ref(pages)
        self.model.by_hand[hold_id] = pages

    def take(self, hold_id: int, num_pages: int) -> None:
        """Somebody outside takes free pages, by hand."""
        self.model.by_hand[hold_id] = self.memory.allocate(min(num_pages, len(self.model.free_pages()))).tolist()

    def let_go(self, hold_id: int) -> None:
        self.memory.unref(self.model.by_hand.pop(hold_id))

    def evict(self, num_pages: int) -> None:
        freed = self.cache.evict(num_pages)
        assert freed == sum(self.model.evict_one(set()) for _ in range(num_pages)), "evict returned a wrong number"

    def demote(self, after: int, tokens: Tokens, namespace: Hashable) -> None:
        demoted = self.cache.demote(tokens, after=after, namespace=namespace)
        assert demoted == self.model.demote(namespace, tokens, after), "demote returned a wrong number"

    def clear(self) -> None:
        self.cache.clear()
        self.model.clear()

    # -- comparing ----------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """M1 to M3 and the balance of references, over all that can be seen."""
        model, cache = self.model, self.cache
        assert ref_counts(self.memory) == dict(model.ref_counts()), "ref counts are out of balance"
        cached = {key: page for key, (page, _) in entries(cache.tree).items()}
        truth = {key: entry.page for key, entry in model.entries.items()}
        assert cached == truth, f"the tree holds {cached}, not {truth}"
        assert tables(cache) == {seq_id: s.pages for seq_id, s in model.running.items()}, "page tables differ"
        for seq_id, sequence in model.running.items():
            assert cache.descriptor.num_tokens(seq_id) == len(sequence.tokens), f"sequence {seq_id} has another length"
            self.memory.assert_right(sequence.pages, sequence.namespace, sequence.tokens, sequence.num_written)
        for (namespace, tokens), entry in model.entries.items():
            self.memory.assert_page_right(entry.page, namespace, tokens)
        assert cache.num_reclaimable_pages == len(model.idle_pages()), "num_reclaimable_pages is wrong"
        self._compare_stats()
        cache.check(outside=model.held_by_hand())

    def _compare_stats(self) -> None:
        stats, counts = self.cache.stats, self.counts
        for name in ("num_query_tokens", "num_hit_tokens", "num_shared_pages", "num_forked_pages"):
            assert getattr(stats, name) == getattr(counts, name), f"{name}: {getattr(stats, name)}, not {counts}"
        assert stats.num_evicted_pages == self.model.num_evicted, "num_evicted_pages is wrong"

    def cached(self, namespace: Hashable = None) -> dict[Tokens, int]:
        """The cached prefixes of a namespace, and the page in which each ends."""
        found = entries(self.cache.tree)
        return {tokens: page for (where, tokens), (page, _) in found.items() if where == namespace}

    def end(self) -> None:
        """M4: everything let go and evicted, one page at a time, every page is free."""
        for name, ids in (("unpin", self.pins), ("let_go", self.model.by_hand), ("abort", self.model.running)):
            for some_id in list(ids):
                self.do((name, some_id))
        while self.model.entries:
            self.do(("evict", 1))
        self.do(("evict", 1))
        assert self.memory.available_pages_count == self.memory.num_pages, "pages are lost"
        assert not self.cache.tree.roots, "an empty root was kept"


def live(page_size: int, num_pages: int, life: str, *, whole_pages: bool = False) -> World:
    """A world after this life."""
    return World(num_pages, page_size, whole_pages=whole_pages).live(life)
