"""A `World` that keeps a diary of what its cache lost: the truth about what `explain` says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from radix.explain import Explanation, Missing
from tests.radix.lives import Call, Tokens
from tests.radix.tables import common_prefix
from tests.radix.world import World

Prefix = tuple[Hashable, Tokens]


@dataclass
class Entry:
    """A call that a prefix was lost in, and the logical times before and after it."""

    call: Call
    before: int
    after: int


class DiaryWorld(World):
    """A `World` that keeps a diary of what its cache lost, and asks for explanations after each call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  as World
        super().__init__(*args, **kwargs)
        self.cached_before: set[Prefix] = set()
        self.lost: dict[Prefix, Entry] = {}
        self.queries: deque[Prefix] = deque(maxlen=5)
        self.cleared: int | None = None
        self.num_explained: dict[str, int] = {}

    def do(self, call: Call) -> bool:
        self.call, self.before = call, self.cache.tree.clock
        return super().do(call)

    def compare(self) -> None:
        super().compare()
        keys = list(self.model.entries)
        cached = {(where, tokens[:end]) for where, tokens in keys for end in range(1, len(tokens) + 1)}
        if self.call[0] == "clear":
            self.lost, self.cleared = {}, self.cache.tree.clock
        else:
            entry = Entry(self.call, self.before, self.cache.tree.clock)
            self.lost |= dict.fromkeys(self.cached_before - cached, entry)
        for where, tokens in cached - self.cached_before:
            if (where, (*tokens, 9)) not in self.queries:
                self.queries.append((where, (*tokens, 9)))
        self.cached_before = cached
        for where, tokens in self.queries:
            self.assert_right(self.cache.explain(tokens, namespace=where), where, tokens)

    def assert_right(self, found: Explanation, where: Hashable, tokens: Tokens) -> None:
        matched = max((end for end in range(len(tokens) + 1) if (where, tokens[:end]) in self.cached_before), default=0)
        assert found.num_tokens == len(tokens)
        assert found.num_cached_tokens == self.model.match(where, tokens).num_cached
        ends = [found.num_cached_tokens, *(part.stop for part in found.missing)]
        assert [part.start for part in found.missing] == ends[:-1], f"{found} has holes"
        assert ends[-1] == len(tokens), f"{found} ends early"
        assert all(part.start < part.stop for part in found.missing), found
        for part in found.missing:
            self.num_explained[part.reason] = self.num_explained.get(part.reason, 0) + 1
            for position in range(part.start, part.stop):
                self.assert_reason_right(part, where, tokens[: position + 1], matched)
        self.assert_divergence_right(found, where, tokens, matched)
        self.assert_elsewhere_right(found, where, tokens, matched)

    def assert_reason_right(self, part: Missing, where: Hashable, prefix: Tokens, matched: int) -> None:
        """What is said of the last token of a prefix."""
        entry = self.lost.get((where, prefix))
        if part.reason == "whole pages only":
            assert len(prefix) <= matched, f"{part} is about what is not cached"
            return
        assert len(prefix) > matched, f"{part} is about what is cached"
        if part.reason == "unknown":
            assert part.since == self.cache.state.history.forgotten_at
            return
        if part.reason == "never published":
            assert entry is None, f"{part}, but {prefix} was lost in {entry}"
            assert part.since == self.cleared
            return
        assert part.eviction is not None
        assert entry is not None, f"{part}, but {prefix} was never lost"
        self.assert_eviction_right(part, entry)

    def assert_eviction_right(self, part: Missing, entry: Entry) -> None:
        eviction, (name, *args) = part.eviction, entry.call
        assert eviction is not None
        assert entry.before <= eviction.tick <= entry.after, f"{part}, but it was {entry}"
        ids: dict[str, Callable[[], Any]] = {
            "start": lambda: [args[0]],
            "start_many": lambda: [item[0] for item in args[0]],
            "extend": lambda: [item[0] for item in args[0]],
            "fork": lambda: [args[1]],
            "evict": list,
        }
        assert eviction.call == name.removesuffix("_many"), f"{part}, but it was {entry}"
        assert set(eviction.seq_ids) <= set(ids[name]()), f"{part}, but it was {entry}"
        assert bool(eviction.seq_ids) == (name != "evict")
        if name in ("start", "start_many", "fork"):
            assert list(eviction.seq_ids) == ids[name]()
        assert eviction.num_wanted_pages > eviction.num_free_pages * (name != "evict")
        assert eviction.num_idle_pages > 0
        total = eviction.num_free_pages + eviction.num_idle_pages + eviction.num_used_pages
        assert total == self.model.num_pages
        assert min(eviction.num_free_pages, eviction.num_used_pages) >= 0

    def assert_divergence_right(self, found: Explanation, where: Hashable, tokens: Tokens, matched: int) -> None:
        if matched == len(tokens):
            assert found.divergence is None
            return
        there = found.divergence
        assert there is not None
        assert (there.position, there.before) == (matched, tokens[:matched][-8:])
        assert there.asked == tokens[matched : matched + 8]
        assert (where, tokens[:matched] + there.cached) in self.cached_before or not there.cached
        longer = [t[matched:] for n, t in self.cached_before if n == where and t[:matched] == tokens[:matched]]
        assert bool(there.cached) == any(longer), "the tree goes on exactly if something is said to follow"
        assert (
            len(there.cached) == 8 or (where, tokens[:matched] + there.cached) in self.model.entries or not any(longer)
        )

    def assert_elsewhere_right(self, found: Explanation, where: Hashable, tokens: Tokens, matched: int) -> None:
        running = {
            seq_id: common_prefix(tokens, tuple(sequence.tokens))
            for seq_id, sequence in self.model.running.items()
            if sequence.namespace == where and not sequence.is_stale
        }
        assert dict(found.running) == {seq_id: num for seq_id, num in running.items() if num > matched}
        others = {name for name, _ in self.cached_before} - {where}
        ends = range(len(tokens) + 1)
        matches = {
            name: max(end for end in ends if not end or (name, tokens[:end]) in self.cached_before) for name in others
        }
        assert dict(found.namespaces) == {name: num for name, num in matches.items() if num > matched}
