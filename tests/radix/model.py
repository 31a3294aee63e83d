"""What each call of `PrefixCache` does to the tables of `tests.radix.tables`, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from tests.radix.tables import Entry, Key, Outcome, Plan, Running, Short, Tables

Prompt = tuple[Hashable, Sequence[int]]


@dataclass
class Model(Tables):
    """The truth about a `PrefixCache` over `num_pages` pages."""

    # -- starting -----------------------------------------------------------------------------------------------------

    def plan(self, prompts: Sequence[Prompt], min_uncached: int) -> list[Plan] | Short:
        """What each prompt finds, or why the pages do not suffice."""
        plans = []
        for namespace, tokens in prompts:
            plan = self.match(namespace, tokens[: max(0, len(tokens) - min_uncached)])
            plan.num_new = self.pages_for(len(tokens)) - len(plan.shared)
            if self.pages_for(len(tokens)) > self.num_pages:
                return Short(self.pages_for(len(tokens)), self.num_pages, is_too_large=True)
            plans.append(plan)
        needed = sum(plan.num_new for plan in plans)
        available = len(self.free_pages()) + len(self._idle_outside(plans))
        return Short(needed, available) if needed > available else plans

    def _idle_outside(self, plans: list[Plan]) -> set[int]:
        return self.idle_pages() - {page for plan in plans for page in plan.shared}

    def start(
        self,
        seq_ids: Sequence[int],
        prompts: Sequence[Prompt],
        plans: list[Plan],
        outcomes: list[Outcome],
    ) -> None:
        """Follows a `start_many` that ended in `outcomes`."""
        for plan, outcome in zip(plans, outcomes, strict=True):
            self._assert_legal(plan, outcome)
        self._assert_tails_given_up_only_if_short(plans, outcomes)
        for plan, outcome in zip(plans, outcomes, strict=True):
            self.use([*plan.shared, *(outcome.forked or ())[:1]])
        for seq_id, (namespace, _), plan in zip(seq_ids, prompts, plans, strict=True):
            self.running[seq_id] = Running([], list(plan.shared), namespace, 0)
        sources = [outcome.forked[0] for outcome in outcomes if outcome.forked]
        self.make_room(sum(plan.num_new for plan in plans), protected=sources)
        for seq_id, (_, tokens), outcome in zip(seq_ids, prompts, outcomes, strict=True):
            sequence = self.running[seq_id]
            self._give(sequence, outcome.pages)
            sequence.tokens, sequence.num_written = list(tokens), outcome.num_cached

    def _assert_legal(self, plan: Plan, outcome: Outcome) -> None:
        assert outcome.num_shared == len(plan.shared), (outcome, plan)
        assert outcome.pages[: len(plan.shared)] == plan.shared, (outcome, plan)
        assert len(outcome.pages) == len(plan.shared) + plan.num_new, (outcome, plan)
        if outcome.forked is None:
            assert outcome.num_cached == len(plan.shared) * self.page_size, (outcome, plan)
            return
        src, dst, num_slots = outcome.forked
        assert outcome.num_cached == plan.num_cached, (outcome, plan)
        assert src in plan.sources, (outcome, plan)
        assert dst == outcome.pages[len(plan.shared)], (outcome, plan)
        assert num_slots == plan.num_cached % self.page_size, (outcome, plan)

    def _assert_tails_given_up_only_if_short(self, plans: list[Plan], outcomes: list[Outcome]) -> None:
        """A tail is given up only where holding the page it is copied from would leave too few pages."""
        idle = self._idle_outside(plans)
        room = len(self.free_pages()) + len(idle) - sum(plan.num_new for plan in plans)
        kept = {outcome.forked[0] for outcome in outcomes if outcome.forked} & idle
        assert room >= len(kept), f"{len(kept)} idle pages are held as sources of tails, but only {room} may be"
        for plan, outcome in zip(plans, outcomes, strict=True):
            if plan.sources and outcome.forked is None:
                assert any(room < len(kept | {page}) for page in plan.sources & idle), f"no need to give up {plan}"

    # -- running sequences --------------------------------------------------------------------------------------------

    def needs_copy(self, seq_id: int) -> bool:
        """The last page is partly filled, and others hold it too: it cannot be written."""
        sequence = self.running[seq_id]
        is_cut = len(sequence.tokens) % self.page_size > 0
        return is_cut and self.ref_counts()[sequence.pages[-1]] > 1

    def plan_extend(self, chunks: Mapping[int, Sequence[int]]) -> int | Short:
        """Pages that appending these tokens takes."""
        needed = 0
        for seq_id, tokens in chunks.items():
            total = self.pages_for(len(self.running[seq_id].tokens) + len(tokens))
            needed += total - len(self.running[seq_id].pages) + self.needs_copy(seq_id)
        available = len(self.free_pages()) + len(self.idle_pages())
        return Short(needed, available) if needed > available else needed

    def extend(self, chunks: Mapping[int, Sequence[int]], tables: dict[int, list[int]]) -> None:
        """Follows an `extend` that left these page tables."""
        needed = self.plan_extend(chunks)
        assert isinstance(needed, int)
        self.make_room(needed)
        copied = [seq_id for seq_id in chunks if self.needs_copy(seq_id)]
        for seq_id, tokens in chunks.items():
            sequence = self.running[seq_id]
            if seq_id in copied:
                self.use(sequence.pages)
                sequence.pages.pop()
            self._give(sequence, tables[seq_id])
            sequence.tokens += tokens
            assert len(sequence.pages) == self.pages_for(len(sequence.tokens))

    def fork(self, seq_id: int, new_seq_id: int, table: list[int]) -> None:
        """Follows a fork: whole pages are shared, a partly filled one is copied."""
        parent = self.running[seq_id]
        num_whole = len(parent.tokens) // self.page_size
        self.make_room(self.num_pages_to_fork(seq_id))
        child = Running(list(parent.tokens), parent.pages[:num_whole], parent.namespace, parent.num_written)
        child.is_stale = parent.is_stale
        self.running[new_seq_id] = child
        self._give(child, table)
        assert len(child.pages) == len(parent.pages)

    def num_pages_to_fork(self, seq_id: int) -> int:
        """1 if the last page is partly filled, else 0."""
        return int(len(self.running[seq_id].tokens) % self.page_size > 0)

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Forgets the tokens from `num_tokens` on; letting go of their pages is a use."""
        sequence = self.running[seq_id]
        self.use(sequence.pages)
        del sequence.tokens[num_tokens:]
        del sequence.pages[self.pages_for(num_tokens) :]
        sequence.num_written = min(sequence.num_written, num_tokens)

    def let_go(self, seq_id: int) -> None:
        """`abort`, and the end of `finish`."""
        self.use(self.running[seq_id].pages)
        del self.running[seq_id]

    def _give(self, sequence: Running, table: list[int]) -> None:
        """The sequence's page table becomes `table`, whose pages past its own must be free."""
        new = table[len(sequence.pages) :]
        assert table[: len(sequence.pages)] == sequence.pages, (table, sequence.pages)
        assert len(set(new)) == len(new), table
        assert set(new) <= self.free_pages(), f"pages {new} were not all free: {sorted(self.free_pages())}"
        sequence.pages += new

    # -- the cached entries -------------------------------------------------------------------------------------------

    def publish(self, seq_id: int, num_tokens: int, *, with_tail: bool, latest: Callable[[set[int]], int]) -> None:
        """Caches the pages of the first `num_tokens` tokens; a page filled in part only `with_tail`.

        A tail that cached pages extend adds nothing and uses one of them, which `latest` picks.
        """
        sequence = self.running[seq_id]
        if sequence.is_stale:
            return
        size = self.page_size
        path = [self._insert(sequence, end) for end in range(size, num_tokens + 1, size)]
        if with_tail and num_tokens % size and not self.whole_pages:
            longer = {self.entries[key].page for key in self._longer(sequence, num_tokens)}
            path.append(latest(longer) if longer else self._insert(sequence, num_tokens))
        self.use(path)

    def _insert(self, sequence: Running, end: int) -> int:
        """The page that ends at token `end`; returns the one that the tree now has for these tokens."""
        key, index = (sequence.namespace, tuple(sequence.tokens[:end])), (end - 1) // self.page_size
        mine = sequence.pages[index]
        if key in self.entries:
            self._adopt(index, mine, self.entries[key].page)
            return self.entries[key].page
        for shorter in self._in_page(sequence.namespace, index):
            if key[1][: len(shorter[1])] == shorter[1]:
                self._move_pins(self.entries.pop(shorter).page, mine)
        self.entries[key] = Entry(mine, self.clock)
        return mine

    def _in_page(self, namespace: Hashable, index: int) -> list[Key]:
        """Entries whose page is the `index`-th of their path."""
        size = self.page_size
        return [key for key in self.entries if key[0] == namespace and index * size < len(key[1]) <= (index + 1) * size]

    def _longer(self, sequence: Running, end: int) -> list[Key]:
        """Entries whose page holds the tokens up to `end`, and perhaps more."""
        here = self._in_page(sequence.namespace, (end - 1) // self.page_size)
        return [key for key in here if key[1][:end] == tuple(sequence.tokens[:end])]

    def _adopt(self, index: int, mine: int, theirs: int) -> None:
        for sequence in self.running.values():
            if sequence.pages[index : index + 1] == [mine]:
                sequence.pages[index] = theirs

    def _move_pins(self, old: int, new: int) -> None:
        """The page `new` takes the place of a partly filled one; pins of that one move."""
        for pages in self.pins.values():
            pages[:] = [new if page == old else page for page in pages]

    def clear(self) -> None:
        """Forgets all entries: pins hold nothing any more, and what runs publishes nothing any more."""
        self.entries.clear()
        for pages in self.pins.values():
            pages.clear()
        for sequence in self.running.values():
            sequence.is_stale = True
