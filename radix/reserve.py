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
from radix.plan import kept_by
from radix.tree import pages_of
from seqattn.errors import NoPageError, PromptTooLargeError

if TYPE_CHECKING:
    from radix.history import Cause, History
    from radix.node import Node
    from radix.plan import Plan
    from radix.stats import CacheStats
    from radix.tree import Kept, RadixTree
    from seqattn.pages import PageAllocator, PageArray

__all__ = ["Reservation", "Reserve"]

NOTHING_KEPT: Mapping[Node, int] = {}
_INT32 = np.dtype(np.int32)


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

    def can_evict(self, num_pages: int, spared: Node | None) -> bool:
        """Whether the next `num_pages` idle pages may simply be taken; False where `reserve` must take a closer look.

        Args:
            num_pages: how many, at least one.
            spared: a node that nothing may be taken from, nor from those above it, which stand behind it in the queue.
        """
        tree = self.tree
        if num_pages > tree.num_idle_pages or self.manager.was_referenced_by_hand:
            return False
        if spared is None or spared.num_holders:  # then those above it are held too
            return True
        num_bytes = num_pages * PAGE_ID_BYTES
        for node in tree.idle:
            if node is spared:
                return False
            num_bytes -= len(node.pages)
            if num_bytes <= 0:
                break
        return True

    def first_victim(self, num_pages: int) -> int:
        """The page that comes first when the next `num_pages` idle pages are taken."""
        pages = next(iter(self.tree.idle)).pages
        at = max(0, len(pages) - num_pages * PAGE_ID_BYTES)
        return int.from_bytes(pages[at : at + PAGE_ID_BYTES], sys.byteorder)

    def take(self, pages: PageArray, call: str, seq_ids: tuple[Hashable, ...]) -> bool:
        """Pages for one sequence: free ones, then idle ones, written to `pages`, int32.

        Returns:
            Whether it was that simple; if not, nothing has changed, and `reserve` takes the closer look.
        """
        manager, tree = self.manager, self.tree
        num_pages, num_free = len(pages), manager.available_pages_count
        missing = num_pages - num_free
        if missing <= 0:
            manager.take_into(pages)
            return True
        if missing > tree.num_idle_pages or manager.was_referenced_by_hand:
            return False
        if num_free:
            manager.take_into(pages[:num_free])
            pages = pages[num_free:]
        cause = tree.clock, call, seq_ids, num_pages, num_free, tree.num_idle_pages
        pages[:] = np.frombuffer(self.evict_next(missing, cause), _INT32)
        return True

    def evict_next(self, num_pages: int, cause: Cause) -> bytes:
        """Trims the next so many pages, which are idle; their references are the caller's now.

        Returns:
            Their numbers as bytes of int32: of each node that loses pages in the order of its tokens.
        """
        tree, stats, history = self.tree, self.stats, self.history
        ages, reuses, idle, clock, runs = stats.evicted_ages, stats.evicted_reuses, tree.idle, tree.clock, None
        stats.num_evicted_pages += num_pages
        while True:
            node = next(iter(idle))
            pages = node.pages
            count = len(pages) // PAGE_ID_BYTES
            if count > num_pages:
                count = num_pages
                pages = pages[-count * PAGE_ID_BYTES :]
            ages[(clock - node.stamp).bit_length()] += count
            reuses[node.num_reuses.bit_length()] += count
            if history.most_records:
                history.note(node, count, cause, tree.page_bytes)
            tree.trim(node, count)
            if count == num_pages:
                return pages if runs is None else b"".join((*runs, pages))
            num_pages -= count
            if runs is None:
                runs = [pages]
            else:
                runs.append(pages)

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
            self.evict_named(reservation.victims, call, tuple(seq_ids), len(reservation.pages), reservation.num_free)

    def cancel(self, reservation: Reservation) -> None:
        """Gives everything back. Victims are still in the tree, and sound: a copy that fails has written nothing."""
        self.manager.drop(reservation.pages[: reservation.num_free])

    def evict(self, num_pages: int) -> int:
        """Frees up to `num_pages` idle pages; returns how many."""
        manager, tree = self.manager, self.tree
        num_free = manager.available_pages_count
        if manager.was_referenced_by_hand:
            victims, pages = self.find(num_pages)
            self.evict_named(victims, "evict", (), num_pages, num_free)
            manager.drop(pages)
            return len(pages)
        count = min(num_pages, tree.num_idle_pages)
        if count:
            cause = tree.clock, "evict", (), num_pages, num_free, tree.num_idle_pages
            evicted = self.evict_next(count, cause)
            if count == 1:
                manager.drop_one(int.from_bytes(evicted, sys.byteorder))
            else:
                manager.drop(np.frombuffer(evicted, _INT32))
        return count

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
                return kept_by(plan)
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

    def evict_named(
        self,
        victims: list[tuple[Node, int]],
        call: str,
        seq_ids: tuple[Hashable, ...],
        num_wanted: int,
        num_free: int,
    ) -> None:
        """Trims the tree and notes why; the pages keep its reference for whoever takes them.

        Args:
            victims: nodes, and how many pages from their ends.
            call: whose pages these are to be: "start", "extend", "fork" or "evict", …
            seq_ids: … and for which sequences.
            num_wanted: pages that it wants in all.
            num_free: how many pages were free.
        """
        tree, stats = self.tree, self.stats
        note = self.history.note if self.history.most_records else None
        clock, ages, reuses = tree.clock, stats.evicted_ages, stats.evicted_reuses
        cause = clock, call, seq_ids, num_wanted, num_free, tree.num_idle_pages
        for node, count in victims:
            ages[(clock - node.stamp).bit_length()] += count
            reuses[node.num_reuses.bit_length()] += count
            stats.num_evicted_pages += count
            if note is not None:
                note(node, count, cause, tree.page_bytes)
            tree.trim(node, count)
