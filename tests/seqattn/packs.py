"""Hybrid packs of a descriptor's batches, each compared with one that is packed from nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from attrs import evolve

from seqattn import CostModel, hybrid_tables, known_forest, long_lists
from seqattn.device import Device
from seqattn.hybrid import check_hybrid, pack_hybrid
from seqattn.known_forest import KnownForest

if TYPE_CHECKING:
    import pytest

    from seqattn import CacheDescriptor, FlashInferHybridData, HybridLevel

#: a device that a few lists fill, and on which a level costs nothing
TINY = evolve(
    Device(), num_processors=24, level_us=0.0, gather_us=0.0, last_us=0.0, start_us=0.0, margin=0.0, margin_us=0.0
)
#: one that keeps all runs, one that drops those that are short or of few, one with a device, which drops short runs,
#: one with a device that cuts long lists
MODELS = [
    None,
    CostModel(level_overhead_us=0.002),
    CostModel(level_overhead_us=0.0, reread_bytes_per_s=4e12),
    CostModel.for_heads(32, 8, 128, 2),
    CostModel.for_heads(32, 8, 128, 2, device=TINY),
]


class Asked(NamedTuple):
    """What a batch is packed with."""

    query_lens: list[int] | None = None
    num_tokens: list[int] | None = None
    model: CostModel | None = None


class Packs:
    """Packs batches and proves them. What was handed out earlier must stay as it was.

    Args:
        descriptor: whose sequences they are.
        pack: what packs them; None for the descriptor itself.

    Attributes:
        num_cut: packs with long lists in levels above the last.
        num_reused, num_changed: packs with the first shared level of the one before, though tables had changed; packs
            of other batches than the one before.
    """

    def __init__(self, descriptor: CacheDescriptor, pack: Callable[..., FlashInferHybridData] | None = None) -> None:
        self.descriptor = descriptor
        self._pack = pack or descriptor.pack_hybrid_for_flashinfer
        self._kept: list[tuple[FlashInferHybridData, list[list[list[int]]]]] = []
        self._version, self._ids = -1, list[Hashable]()
        self.num_reused = self.num_changed = self.num_cut = 0

    def pack(self, ids: Sequence[Hashable], asked: Asked) -> FlashInferHybridData:
        data = self._pack(ids, query_lens=asked.query_lens, num_tokens=asked.num_tokens, cost_model=asked.model)
        self.prove(data, ids, asked)
        self._count(data, ids)
        self._kept = [*self._kept[-4:], (data, as_lists(data))]
        for earlier, lists in self._kept:
            assert as_lists(earlier) == lists, "what was handed out has changed"
        return data

    def prove(self, data: FlashInferHybridData, ids: Sequence[Hashable], asked: Asked) -> None:
        page_size, model = self.descriptor.page_size, asked.model
        tables, lens = self.descriptor.tables(ids, asked.num_tokens)
        rows = asked.query_lens or [1] * len(ids)
        check_hybrid(data, tables, lens, rows, page_size, model)
        assert (np.diff(data.levels[-1].kv_page_indptr.numpy()) > 0).all(), "new tokens are written in the last level"
        anew = pack_hybrid(tables, lens, page_size=page_size, query_lens=rows, cost_model=model)
        found, expected = runs_of(data), runs_of(anew)
        has_long = any(len(members) == 1 for members, _ in found)
        self.num_cut += has_long
        if has_long or (model is not None and model.device is TINY):
            return  # with nearly the same lengths a batch stays as it is
        assert found == expected, "other runs"
        # In an order that is depth-first a batch stays as it is: so all levels must be the same.
        order = data.order.tolist()
        anew = pack_hybrid(
            [tables[i] for i in order],
            lens[order],
            page_size=page_size,
            query_lens=[rows[i] for i in order],
            cost_model=model,
        )
        assert anew.order.tolist() == list(range(len(ids))), "not depth-first"
        assert as_lists(data)[1:] == as_lists(anew)[1:]

    def _count(self, data: FlashInferHybridData, ids: Sequence[Hashable]) -> None:
        version, self._version = self._version, self.descriptor.tables_version
        is_known, self._ids = list(ids) == self._ids, list(ids)
        if self._kept and is_known:
            before = self._kept[-1][0]
            is_same = len(before.levels) > 1 and data.levels[0] is before.levels[0]
            self.num_reused += is_same and version != self._version
        self.num_changed += not is_known


def as_lists(data: FlashInferHybridData) -> list[list[list[int]]]:
    """The order, then the levels."""
    return [[data.order.tolist()], *map(_level_as_lists, data.levels)]


def _level_as_lists(level: HybridLevel) -> list[list[int]]:
    tensors = (level.qo_indptr, level.kv_page_indptr, level.kv_page_indices, level.kv_last_page_len)
    return [tensor.tolist() for tensor in tensors]


def runs_of(data: FlashInferHybridData) -> set[tuple[frozenset[int], tuple[int, ...]]]:
    """The sequences and pages of each group of a shared level that has pages."""
    order, found = data.order.tolist(), set[tuple[frozenset[int], tuple[int, ...]]]()
    first_rows = data.levels[-1].qo_indptr.tolist()
    for level in data.levels[:-1]:
        bounds = np.searchsorted(first_rows, level.qo_indptr.numpy()).tolist()
        for (first, stop), (begin, end) in zip(pairwise(bounds), pairwise(level.kv_page_indptr.tolist()), strict=True):
            if begin < end:
                found.add((frozenset(order[first:stop]), tuple(level.kv_page_indices[begin:end].tolist())))
    return found


def reuse_whatever_changes(patch: pytest.MonkeyPatch) -> None:
    """From now on no change of a batch is too much of it, and no list too short to be cut.

    Batches of tests are small: else all changes would be, and all lists.
    """
    patch.setattr(long_lists, "_LEAST", 1)
    patch.setattr(known_forest, "_JOINED", 1)
    patch.setattr(hybrid_tables, "_NEW", 1)


def count_forests(patch: pytest.MonkeyPatch) -> Counter[str]:
    """From now on, how often a forest is built, and how often one is changed."""
    made = Counter[str]()
    built, changed = KnownForest.built, KnownForest.changed

    def counted_built(*arguments: Any) -> KnownForest:  # noqa: ANN401  what it counts takes
        made["built"] += 1
        return built(*arguments)

    def counted_changed(*arguments: Any) -> KnownForest | None:  # noqa: ANN401  as above
        found = changed(*arguments)
        made["changed"] += found is not None
        return found

    patch.setattr(KnownForest, "built", counted_built)
    patch.setattr(KnownForest, "changed", counted_changed)
    return made
