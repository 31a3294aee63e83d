"""How a sequence will start: what of its prompt the tree has, what of that it shares, and what it copies."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal

from attrs import define

from radix.node import PAGE_ID_BYTES
from radix.tokens import TOKEN_BYTES

if TYPE_CHECKING:
    from radix.node import Node
    from radix.tree import Kept, Path, RadixTree

__all__ = ["Plan", "kept_by", "plan_start", "source_of"]

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
        return source_of(self.path, self.num_shared)

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


def source_of(path: Path, num_shared: int) -> int:
    """The page after the first `num_shared` of a path: where a tail is copied from."""
    at = num_shared * PAGE_ID_BYTES
    return int.from_bytes(path.pages[at : at + PAGE_ID_BYTES], sys.byteorder)


class _KeptBy:
    """What one plan keeps of a short path, found when asked: a walk over victims asks for few nodes."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def get(self, node: Node, default: Literal[0], /) -> int:
        return _kept_by(self.plan).get(node, default) if node in self.plan.path.nodes else default


def kept_by(plan: Plan) -> Kept:
    """How many pages of each node a plan keeps: those it shares, and the one that its tail is copied from."""
    return _KeptBy(plan) if len(plan.path.nodes) <= _SHORT_PATH else _kept_by(plan)


def _kept_by(plan: Plan) -> dict[Node, int]:
    kept: dict[Node, int] = {}
    plan.keep_shared(kept)
    if plan.tail_len:
        kept[plan.path.nodes[-1]] = plan.pages_to_source()
    return kept


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
