"""Why a prompt was not found: how far it matches, what stands there instead, and what became of the rest.

    41 tokens asked: 24 cached, 17 missing
    they part at token 24, after ' a b c'
        asked    ' d e f g'
        cached   ' x y z'
    24 to 32: evicted at tick 90 by extend of 'ann', 'ben', which wanted 2 pages: 0 free, 9 idle, 55 in use
    32 to 41: never published
    28 of them match in namespace 'tenant b'

What is said of evictions is exact: see `radix.history`. Explaining changes nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal, TypeAlias

from attrs import field, frozen

from radix.tokens import TOKEN_BYTES, common_bytes, token_ids

if TYPE_CHECKING:
    from radix.history import Cause
    from radix.node import Node
    from radix.running import Running
    from radix.show import Decode
    from radix.state import State
    from radix.tree import Path

__all__ = ["Divergence", "Eviction", "Explanation", "Missing", "explain"]

Reason: TypeAlias = Literal["evicted", "never published", "unknown", "whole pages only"]

_WINDOW = 8


@frozen
class Eviction:
    """Why pages were evicted.

    Attributes:
        tick: logical time.
        call: what needed pages: `start`, `extend` or `fork`; `evict` if that was called.
        seq_ids: the sequences that the pages went to; none for `evict`.
        num_wanted_pages: pages that the call needed.
        num_free_pages: pages that were free.
        num_idle_pages: pages that only the tree held, those that the call shares left out.
        num_used_pages: all others, those that the call shares included.
    """

    tick: int
    call: str
    seq_ids: tuple[Hashable, ...]
    num_wanted_pages: int
    num_free_pages: int
    num_idle_pages: int
    num_used_pages: int

    def __str__(self) -> str:
        """In words."""
        whose = f" of {', '.join(map(repr, self.seq_ids))}" if self.seq_ids else ""
        pages = f"{self.num_free_pages:,} free, {self.num_idle_pages:,} idle, {self.num_used_pages:,} in use"
        plural = "s" * (self.num_wanted_pages != 1)
        return (
            f"at tick {self.tick} by {self.call}{whose}, which wanted {self.num_wanted_pages:,} page{plural}: {pages}"
        )


@frozen
class Missing:
    """Tokens `start` to `stop` of the query are not cached, for one reason.

    Attributes:
        start: the first of them.
        stop: the one after the last.
        reason: `evicted`; `never published` by any sequence since the cache was made or cleared; `unknown` if the
            history does not go back so far; `whole pages only` for what the tree has but a cache of whole pages does
            not share.
        eviction: the last time that they were evicted, None for the other reasons.
        since: logical time of the last record that the history had to drop (`unknown`), or of the `clear` after which
            they were never published. None: the history is switched off, or there was no `clear`.
    """

    start: int
    stop: int
    reason: Reason
    eviction: Eviction | None = None
    since: int | None = None

    def __str__(self) -> str:
        """In words."""
        where = f"{self.start:,} to {self.stop:,}: "
        if self.eviction is not None:
            return f"{where}evicted {self.eviction}"
        if self.reason == "never published":
            return f"{where}never published" + (
                f" since the clear at tick {self.since}" if self.since is not None else ""
            )
        if self.reason == "whole pages only":
            return f"{where}cached, but only whole pages are shared"
        if self.since is None:
            return f"{where}never published or evicted: no history is kept"
        return f"{where}never published, or evicted at tick {self.since} or before: the history does not go back so far"


@frozen
class Divergence:
    """Where the query leaves what is cached, with up to eight tokens on each side.

    Attributes:
        position: the first token of the query that does not match.
        before: the tokens before it, which match.
        asked: what follows in the query.
        cached: what follows in the tree: the nearest branch, or the last used of several. Empty where the tree ends.
        texts: `before`, `asked` and `cached` decoded, if there was something to decode with.
    """

    position: int
    before: tuple[int, ...]
    asked: tuple[int, ...]
    cached: tuple[int, ...]
    texts: tuple[str, str, str] | None = None

    def __str__(self) -> str:
        """In words, on two or three lines."""
        ids = (str(list(side)) for side in (self.before, self.asked, self.cached))
        before, asked, cached = map(repr, self.texts) if self.texts else ids
        verb, there = ("they part", f"\n    cached   {cached}") if self.cached else ("what is cached ends", "")
        return f"{verb} at token {self.position:,}, after {before}\n    asked    {asked}{there}"


@frozen
class Explanation:
    """Why some tokens are cached and others are not, as of now.

    Attributes:
        num_tokens: tokens of the query.
        num_cached_tokens: how many of them `match` finds.
        divergence: where they part; None if all are cached.
        missing: the reasons, in order, for everything from `num_cached_tokens` on.
        running: sequences that have more of these tokens than are cached, but have not published them, and how many.
        namespaces: other namespaces in which more of these tokens are cached, and how many.
    """

    num_tokens: int
    num_cached_tokens: int
    divergence: Divergence | None
    missing: tuple[Missing, ...]
    running: tuple[tuple[Hashable, int], ...] = field(default=())
    namespaces: tuple[tuple[Hashable, int], ...] = field(default=())

    @property
    def num_missing_tokens(self) -> int:
        """Tokens that would have to be computed."""
        return self.num_tokens - self.num_cached_tokens

    def __str__(self) -> str:
        """All of it in words, a line for each fact."""
        lines = [
            f"{self.num_tokens:,} tokens asked: {self.num_cached_tokens:,} cached, {self.num_missing_tokens:,} missing"
        ]
        lines += [str(self.divergence)] if self.divergence else []
        lines += map(str, self.missing)
        lines += [f"{num:,} of them are sequence {seq_id!r}'s, not published yet" for seq_id, num in self.running]
        lines += [f"{num:,} of them match in namespace {namespace!r}" for namespace, num in self.namespaces]
        return "\n".join(lines)


def explain(state: State, query: bytes, namespace: Hashable, num_cached: int, decode: Decode | None) -> Explanation:
    """Why `query` is cached as far as it is; changes nothing.

    Args:
        state: of the cache.
        query: token ids as a key.
        namespace: where to look.
        num_cached: how many of the tokens are shared with a new sequence.
        decode: turns token ids into text; None leaves the texts out.

    Cost: a comparison with each record of the history, each namespace and each running sequence.
    """
    path = state.tree.match(query, namespace)
    size, matched = len(query), path.num_bytes
    missing = (
        [Missing(num_cached, matched // TOKEN_BYTES, "whole pages only")] if num_cached < matched // TOKEN_BYTES else []
    )
    missing += _missing(state, query, namespace, matched)
    return Explanation(
        size // TOKEN_BYTES,
        num_cached,
        _divergence(state, query, namespace, path, decode) if matched < size else None,
        tuple(missing),
        tuple(_running(state, query, namespace, matched)),
        tuple(_namespaces(state, query, namespace, matched)),
    )


def _missing(state: State, query: bytes, namespace: Hashable, start: int) -> list[Missing]:
    """What history says of `query[start:]`, then what it cannot say."""
    history, num_pages, found = state.history, state.manager.num_pages, []
    for cause, first, last in history.losses(query, namespace, start):
        found.append(Missing(first // TOKEN_BYTES, last // TOKEN_BYTES, "evicted", _eviction(cause, num_pages)))
        start = last
    if start < len(query):
        ends = start // TOKEN_BYTES, len(query) // TOKEN_BYTES
        if not history.most_records or history.forgotten_at is not None:
            found.append(Missing(*ends, "unknown", since=history.forgotten_at))
        else:
            found.append(Missing(*ends, "never published", since=history.cleared_at))
    return found


def _eviction(cause: Cause, num_pages: int) -> Eviction:
    *_, num_free, num_idle = cause
    return Eviction(*cause, num_pages - num_free - num_idle)


def _divergence(state: State, query: bytes, namespace: Hashable, path: Path, decode: Decode | None) -> Divergence:
    """The tokens around the end of a match."""
    at, span = path.num_bytes, _WINDOW * TOKEN_BYTES
    node: Node | None = path.nodes[-1] if path.nodes else state.tree.roots.get(namespace)
    end = sum(len(each.key) for each in path.nodes)
    cached = node.key[len(node.key) - (end - at) :] if node is not None and end > at else b""
    while node is not None and len(cached) < span:
        node = max(node, key=_last_used, default=None)
        cached += node.key if node is not None else b""
    parts = [query[max(0, at - span) : at], query[at : at + span], cached[:span]]
    before, asked, there = (token_ids(part).tolist() for part in parts)
    texts = (decode(before), decode(asked), decode(there)) if decode else None
    return Divergence(at // TOKEN_BYTES, tuple(before), tuple(asked), tuple(there), texts)


def _last_used(node: Node) -> tuple[int, bytes]:
    """The order of siblings: by use, then by tokens, so that the answer is always the same."""
    return node.stamp, node.key


def _running(state: State, query: bytes, namespace: Hashable, start: int) -> list[tuple[Hashable, int]]:
    """Running sequences that have more than `start` bytes of the query, unless they will publish nothing."""
    found = []
    for seq_id, run in state.running.items():
        if not run.is_detached and _is_same(run.namespace, namespace):
            common = _common(run, query)
            if common > start:
                found.append((seq_id, common // TOKEN_BYTES))
    return found


def _common(run: Running, query: bytes) -> int:
    """Bytes that a sequence's tokens have in common with the query."""
    common = common_bytes(run.prompt, query)
    if common < len(run.prompt):
        return common
    return common + common_bytes(bytes(run.tail), query, common)


def _namespaces(state: State, query: bytes, namespace: Hashable, start: int) -> list[tuple[Hashable, int]]:
    """Other namespaces that have more than `start` bytes of the query, most first."""
    others = [root.namespace for root in state.tree.roots.values() if not _is_same(root.namespace, namespace)]
    found = [(other, state.tree.match(query, other).num_bytes) for other in others]
    return [(other, size // TOKEN_BYTES) for other, size in sorted(found, key=lambda item: -item[1]) if size > start]


def _is_same(left: Hashable, right: Hashable) -> bool:
    """Whether two namespaces are one; a NaN equals nothing, but is itself."""
    return left is right or left == right
