"""A slow, obvious model of `PrefixCache`: no tree, no queue, no counters; everything is recomputed from four tables.

What is cached is a plain dict from (namespace, tokens) to the page that ends there. At page size 2, after finishing
[5, 6, 7] and [5, 6, 8, 9, 4]:

    (None, (5, 6))           page 0
    (None, (5, 6, 7))        page 1      a partly filled tail
    (None, (5, 6, 8, 9))     page 3
    (None, (5, 6, 8, 9, 4))  page 4

An entry whose length is no multiple of the page size is such a tail. A page's reference count is how often it is listed
in the tables. An entry is idle when that is once. Eviction takes, again and again, the idle entry that nothing else
extends and whose stamp is smallest.

Where the cache is free to choose (which of two equally good pages a tail is forked from, which free page comes next),
the model is told what happened, asserts that it was legal, and follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]
Key = tuple[Hashable, Tokens]


@dataclass
class Entry:
    """A cached page and when it was last used."""

    page: int
    stamp: int


@dataclass
class Running:
    """A sequence: its tokens, its page table, and how many of its tokens have their KV written."""

    tokens: list[int]
    pages: list[int]
    namespace: Hashable
    num_written: int
    is_stale: bool = False


@dataclass
class Plan:
    """What a prompt finds: pages shared whole, and the pages that a partial tail may be forked from."""

    num_cached: int
    shared: list[int]
    sources: set[int]
    num_new: int


@dataclass
class Outcome:
    """What the cache did with a prompt."""

    num_cached: int
    num_shared: int
    forked: tuple[int, int, int] | None
    pages: list[int]


@dataclass(frozen=True)
class Short:
    """The call must raise `NoPageError` with these numbers."""

    needed: int
    available: int
    is_too_large: bool = False


@dataclass
class Tables:
    """Who lists which page, and all that follows from it."""

    num_pages: int
    page_size: int
    whole_pages: bool = False
    entries: dict[Key, Entry] = field(default_factory=dict)
    running: dict[int, Running] = field(default_factory=dict)
    pins: dict[int, list[int]] = field(default_factory=dict)
    by_hand: dict[int, list[int]] = field(default_factory=dict)
    clock: int = 0
    num_evicted: int = 0

    def ref_counts(self) -> Counter[int]:
        """How often each page is listed; free pages are absent."""
        counts = Counter(entry.page for entry in self.entries.values())
        for sequence in self.running.values():
            counts.update(sequence.pages)
        for pages in (*self.pins.values(), *self.by_hand.values()):
            counts.update(pages)
        return counts

    def free_pages(self) -> set[int]:
        """Pages that nobody lists."""
        return set(range(self.num_pages)) - set(self.ref_counts())

    def idle_pages(self) -> set[int]:
        """Pages that only the tree lists."""
        counts = self.ref_counts()
        return {entry.page for entry in self.entries.values() if counts[entry.page] == 1}

    def held_by_hand(self) -> list[int]:
        """One entry a reference that belongs to nobody the cache knows."""
        return [page for pages in self.by_hand.values() for page in pages]

    def match(self, namespace: Hashable, tokens: Sequence[int]) -> Plan:
        """The longest common prefix with anything cached, by trying every entry."""
        wanted, size = tuple(tokens), self.page_size
        here = [tokens_ for namespace_, tokens_ in self.entries if namespace_ == namespace]
        best = max((common_prefix(wanted, tokens_) for tokens_ in here), default=0)
        if self.whole_pages:
            best -= best % size
        full = best - best % size
        shared = [self.entries[namespace, wanted[:end]].page for end in range(size, full + 1, size)]
        sources = set()
        if best > full:
            in_page = [tokens_ for tokens_ in here if full < len(tokens_) <= full + size]
            sources = {self.entries[namespace, t].page for t in in_page if t[:best] == wanted[:best]}
        return Plan(best, shared, sources, num_new=self.pages_for(len(wanted)) - len(shared))

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.page_size)

    # -- use and eviction ----------------------------------------------------------------------------------------------

    def use(self, pages: Iterable[int]) -> None:
        """Stamps the cached ones among these pages: a path from the root, or nothing."""
        self.clock += 1
        used = set(pages)
        for entry in self.entries.values():
            if entry.page in used:
                entry.stamp = self.clock

    def make_room(self, needed: int, protected: Iterable[int] = ()) -> None:
        """Evicts until `needed` pages are free."""
        num_free = len(self.free_pages())
        for _ in range(num_free, needed):
            assert self.evict_one(set(protected)), "nothing left to evict"

    def evict_one(self, protected: set[int]) -> bool:
        """Evicts the least recently used idle entry that no other extends."""
        idle = self.idle_pages() - protected
        leaves = [key for key, entry in self.entries.items() if entry.page in idle and not self._is_extended(key)]
        if not leaves:
            return False
        oldest = min(self.entries[key].stamp for key in leaves)
        victims = [key for key in leaves if self.entries[key].stamp == oldest]
        assert len(victims) == 1, f"the model cannot tell which is older: {victims}"
        del self.entries[victims[0]]
        self.num_evicted += 1
        return True

    def demote(self, namespace: Hashable, tokens: Tokens, after: int) -> int:
        """What nobody holds or continues of a cached prefix, from the first page past `after`, is the oldest now."""
        ends = [end for end in range(1, len(tokens) + 1) if (namespace, tokens[:end]) in self.entries]
        best = max((common_prefix(tokens, key[1]) for key in self.entries if key[0] == namespace), default=0)
        if not ends or ends[-1] != best:
            return 0
        chain = [(namespace, tokens[:end]) for end in ends]
        held = {page for sequence in self.running.values() for page in sequence.pages}
        held |= {page for pages in self.pins.values() for page in pages}
        oldest = min(entry.stamp for entry in self.entries.values()) - 1
        moved = []
        for key in reversed(chain):
            first = (len(key[1]) - 1) // self.page_size * self.page_size
            others = [k for k in self.entries if k not in chain and k[0] == namespace and k[1][: len(key[1])] == key[1]]
            if first < after or others or self.entries[key].page in held:
                break
            moved.append(key)
        for key in moved:
            self.entries[key].stamp = oldest
        if moved:
            self.use(self.entries[key].page for key in chain if key not in moved)
        return len(moved)

    def _is_extended(self, key: Key) -> bool:
        return any(k != key and k[0] == key[0] and k[1][: len(key[1])] == key[1] for k in self.entries)


def common_prefix(left: Tokens, right: Tokens) -> int:
    """How many leading tokens are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
