"""Getting pages: what a start needs, what can be had, and taking it all or not at all.

A reservation takes the free pages it needs and names the idle pages to evict for the rest, but leaves those in the tree
until `commit`, which hands them over with their reference count as it is: the tree's reference becomes the new owner's.
So whatever fails between, `cancel` leaves everything as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from attrs import define

from radix.node import PAGE_ID_BYTES
from radix.tokens import TOKEN_BYTES
from radix.tree import pages_of
from seqattn.errors import NoPageError, PromptTooLargeError

if TYPE_CHECKING:
    from radix.history import History
    from radix.node import Node
    from radix.stats import CacheStats
    from radix.tree import Kept, Path, RadixTree
    from seqattn.pages import PageAllocator, PageArray

__all__ = ["Plan", "Reservation", "Reserve"]

NOTHING_KEPT: Mapping[Node, int] = {}
_SHORT_PATH = 8


@define(slots=True, eq=False)
class Plan:
    """How one sequence will start.

        prompt of 11 tokens, page_size 4:   [shared][tail: 2 cached, forked + new][new]
                                             num_shared 1        tail_len 2       num_pages 3

    Attributes:
        seq_id, key, namespace: as given, tokens as bytes.
        path: what the tree has of it.
        num_shared: full pages to share.
        tail_len: tokens of the next page to copy; 0 for no fork.
        num_pages: pages of the whole sequence.
    """

    seq_id: Hashable
    key: bytes
    namespace: Hashable
    path: Path
    num_shared: int
    tail_len: int
    num_pages: int

    @property
    def num_new(self) -> int:
        """Pages it needs beyond the shared ones."""
        return self.num_pages - self.num_shared

    @property
    def source(self) -> int:
        """The page that the tail is copied from."""
        at = self.num_shared * PAGE_ID_BYTES
        return int.from_bytes(self.path.pages[at : at + PAGE_ID_BYTES], sys.byteorder)

    def keep_shared(self, kept: dict[Node, int]) -> None:
        """Adds to `kept` how many pages of each node are shared and must not be evicted."""
        end, wanted = self.path.num_pages, self.num_shared
        for node in reversed(self.path.nodes):
            start = end - node.num_pages
            if wanted > start:
                kept[node] = max(kept.get(node, 0), min(wanted, end) - start)
            end = start

    def pages_to_source(self) -> int:
        """Pages of the path's last node up to the one that the tail is copied from, which lies in it."""
        return self.num_shared + 1 - self.path.num_pages + self.path.nodes[-1].num_pages


class _KeptBy:
    """What one plan keeps of a short path, found when asked: a walk over victims asks for few nodes."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def get(self, node: Node, default: Literal[0], /) -> int:
        return _kept_by(self.plan).get(node, default) if node in self.plan.path.nodes else default


def _kept_by(plan: Plan) -> dict[Node, int]:
    kept: dict[Node, int] = {}
    plan.keep_shared(kept)
    if plan.tail_len:
        kept[plan.path.nodes[-1]] = plan.pages_to_source()
    return kept


class _HeldByHand:
    """Pages that are held by hand, which stay with everything above them, on top of what else is kept.

    It must be asked in the order of the idle queue, in which children come before their parents.
    """

    __slots__ = ("blocked", "kept", "ref_count")

    def __init__(self, ref_count: PageArray, kept: Kept) -> None:
        self.ref_count = ref_count
        self.kept = kept
        self.blocked: set[Node] = set()

    def get(self, node: Node, default: Literal[0], /) -> int:
        held = np.flatnonzero(self.ref_count[node.page_ids] > 1)
        count = max(int(held[-1]) + 1 if len(held) else 0, self.kept.get(node, default))
        if node in self.blocked:
            count = node.num_pages
        if count and node.parent is not None:
            self.blocked.add(node.parent)
        return count


@define(slots=True, eq=False)
class Reservation:
    """Pages for one call: `pages`, int32, the first `num_free` of them from the free list, the rest from the tree."""

    pages: PageArray
    num_free: int
    victims: list[tuple[Node, int]]


@define(slots=True, eq=False)
class Reserve:
    """Free pages and idle pages together."""

    manager: PageAllocator
    tree: RadixTree
    stats: CacheStats
    history: History

    def reserve(self, num_pages: int, kept: Kept = NOTHING_KEPT) -> Reservation:
        """Pages for `num_pages`, idle ones outside `kept` if too few are free.

        Raises:
            NoPageError: not enough even so; nothing has changed.
        """
        num_free = min(num_pages, self.manager.available_pages_count)
        pages = np.empty(num_pages, dtype=np.int32)
        victims: list[tuple[Node, int]] = []
        if num_free < num_pages:
            victims, named = self.find(num_pages - num_free, kept)
            if len(named) < num_pages - num_free:
                raise NoPageError(num_pages, num_free + len(named))
            pages[num_free:] = named
        if num_free:
            self.manager.take_into(pages[:num_free])
        return Reservation(pages, num_free, victims)

    def commit(self, reservation: Reservation, call: str, seq_ids: Iterable[Hashable]) -> None:
        """Takes the victims out of the tree; the pages are the caller's now, who names its call and sequences."""
        if reservation.victims:
            self._evict(reservation.victims, call, tuple(seq_ids), len(reservation.pages), reservation.num_free)

    def cancel(self, reservation: Reservation) -> None:
        """Gives everything back. Victims are still in the tree, and sound: a copy that fails has written nothing."""
        self.manager.drop(reservation.pages[: reservation.num_free])

    def evict(self, num_pages: int) -> int:
        """Frees up to `num_pages` idle pages; returns how many."""
        victims, pages = self.find(num_pages)
        self._evict(victims, "evict", (), num_pages, self.manager.available_pages_count)
        self.manager.free(pages)
        return len(pages)

    def find(self, num_pages: int, kept: Kept = NOTHING_KEPT) -> tuple[list[tuple[Node, int]], PageArray]:
        """The victims that free the next `num_pages` idle pages, and those pages, in the order in which they go.

        Pages that are held by hand are in use: they and those above them stay.
        """
        if self.manager.was_referenced_by_hand:
            kept = _HeldByHand(self.manager.ref_count, kept)
        victims = self.tree.victims(num_pages, kept)
        return victims, np.frombuffer(pages_of(victims), np.int32)

    def num_reclaimable(self, kept: Mapping[Node, int] = NOTHING_KEPT, *, most: int | None = None) -> int:
        """Idle pages outside `kept`, or `most` if there are more.

        O(kept), but O(nodes of those pages) once pages were referenced by hand: only a look at them tells then.
        """
        if self.manager.was_referenced_by_hand:
            return len(self.find(self.tree.num_idle_pages if most is None else most, kept)[1])
        return self.tree.num_idle_pages - sum([count for node, count in kept.items() if not node.num_holders])

    def fit(self, plans: list[Plan]) -> Kept:
        """Makes plans fit: gives up tails, last plans first, where the page they are copied from is missing.

        Returns:
            What must be kept of each node while evicting.

        Raises:
            PromptTooLargeError: a sequence that needs more pages than there are.
            NoPageError: the plans need more pages than are free or can be evicted; nothing has changed.

        Cost: O(plans) if pages are free or many are idle, else O(nodes of their paths).
        """
        needed, most = 0, self.manager.num_pages
        for plan in plans:
            if plan.num_pages > most:
                raise PromptTooLargeError(plan.num_pages, most)
            needed += plan.num_pages - plan.num_shared
        missing = needed - self.manager.available_pages_count
        if missing <= 0:
            return NOTHING_KEPT
        if len(plans) == 1 and not self.manager.was_referenced_by_hand:
            plan = plans[0]
            if missing <= self.tree.num_idle_pages - plan.path.num_pages:
                return _KeptBy(plan) if len(plan.path.nodes) <= _SHORT_PATH else _kept_by(plan)
        return self._fit_tightly(plans, needed, missing)

    def _fit_tightly(self, plans: list[Plan], needed: int, missing: int) -> dict[Node, int]:
        """`fit` when it is close: counts exactly what is kept, tails in the order of the plans."""
        kept: dict[Node, int] = {}
        for plan in plans:
            plan.keep_shared(kept)
        spare = self.num_reclaimable(kept, most=missing + len(plans)) - missing
        if spare < 0:
            raise NoPageError(needed, needed + spare)
        for plan in plans:
            if plan.tail_len:
                last, count = plan.path.nodes[-1], plan.pages_to_source()
                is_idle = not last.num_holders and self.manager.ref_count[plan.source] == 1
                cost = max(0, count - kept.get(last, 0)) if is_idle else 0
                if cost > spare:
                    plan.tail_len = 0
                    continue
                spare -= cost
                kept[last] = max(count, kept.get(last, 0))
        return kept

    def _evict(
        self, victims: list[tuple[Node, int]], call: str, seq_ids: tuple[Hashable, ...], num_wanted: int, num_free: int
    ) -> None:
        """Trims the tree and notes why; the pages keep its reference for whoever takes them."""
        clock, stats = self.tree.clock, self.stats
        ages, reuses = stats.evicted_ages, stats.evicted_reuses
        for node, count in victims:
            ages[(clock - node.stamp).bit_length()] += count
            reuses[node.num_reuses.bit_length()] += count
            stats.num_evicted_pages += count
        if victims and self.history.most_records:
            cause = (clock, call, seq_ids, num_wanted, num_free, self.tree.num_idle_pages)
            self.history.note(victims, cause, self.tree.page_bytes)
            self.tree.trim(victims)
            self.history.follow(victims[-1][0])
        else:
            self.tree.trim(victims)


def plan_start(
    tree: RadixTree, seq_id: Hashable, key: bytes, namespace: Hashable, *, max_cached: int, whole_pages: bool
) -> Plan:
    """Looks up what a sequence can reuse; changes nothing.

    Args:
        tree: where to look.
        seq_id: kept for later.
        key: tokens as bytes, not empty.
        namespace: under which root.
        max_cached: reuse at most this many tokens.
        whole_pages: share full pages only, fork no tail.
    """
    path = tree.match(key, namespace, limit=max(0, max_cached) * TOKEN_BYTES)
    num_shared, tail = divmod(path.num_bytes, tree.page_bytes)
    return Plan(
        seq_id,
        key,
        namespace,
        path,
        num_shared,
        0 if whole_pages else tail // TOKEN_BYTES,
        -(-len(key) // tree.page_bytes),
    )
