"""Hybrid packs of a descriptor's batches, made of what an earlier pack found out.

While a batch decodes its tables grow at their ends and all else stays. So the shared levels of the step before are
given out again, the same objects, and only the last level is made anew; its pages too where a table has grown:

    step       level 0 (shared)      last level
    k          [0 1 2]               [5] [6 7] [8]
    k + 1      the same object       [5] [6 7 9] [8]      the second sequence needed a page

Of the last few batches this is remembered, each part with what it was made from:

- the forest: of the tables' entries, which `SequenceData.mark` tells to be the same but for pages appended, and of
  limits (`seqattn.known_forest`). If few sequences have left, joined or been rewritten, it is changed accordingly.
- which runs are kept, and which long lists are cut (`seqattn.long_lists`): of the forest, the query rows, the cost
  model, lengths in steps of so many tokens, and limits.
- the shared levels and the order: of the forest, the query rows and the kept runs.
- the last level: of these and the number of pages of each sequence. Its lengths are always new.

What was handed out is never written to. No sequence and no table is kept: only marks, numbers and packed levels.
"""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from attrs import define

from seqattn.asked_batch import Batch, asked_batch
from seqattn.cost import CostModel
from seqattn.flat_tables import as_int32
from seqattn.forest import Run
from seqattn.hybrid import model_of
from seqattn.known_forest import KnownForest
from seqattn.last_pages import LastPages
from seqattn.levels import pages_above, shared_levels, summed
from seqattn.long_lists import runs_to_keep
from seqattn.packed import FlashInferHybridData, HybridLevel

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy.typing as npt

    from seqattn.descriptor import CacheDescriptor
    from seqattn.sequence import SequenceData

    Int64Array = npt.NDArray[np.int64]

__all__ = ["HybridTables"]

#: batches that are remembered: one that decodes, what it was before somebody joined, and one beside it
_MOST_BATCHES = 8
#: one sequence in so many may have no mark yet for a known batch to be looked for that has the others
_NEW = 8
#: the cost model is asked again when the mean or the longest sequence has grown by so many tokens
_TOKENS_ALIKE = 32


@define(slots=True, frozen=True, eq=False)
class _Choice:
    """Which runs are levels' groups, and for what: lengths in steps."""

    model: CostModel | None
    lens: tuple[int, int]
    runs: list[Run]


@define(slots=True, frozen=True, eq=False)
class _Levels:
    """A packed batch.

    Attributes:
        rows: as of the batch.
        choice: the kept runs.
        places: number of the sequence at each position, int64 [batch].
        order: the same as it is handed out.
        shared: the levels above the last.
        begins: pages above the last level, at each position, int64 [batch].
        counts: pages at each position, int64 [batch], when `last` was made.
        last: the last level.
    """

    rows: Int64Array | None
    choice: _Choice
    places: Int64Array
    order: torch.Tensor
    shared: tuple[HybridLevel, ...]
    begins: Int64Array
    counts: Int64Array
    last: HybridLevel


@define(slots=True, frozen=True, eq=False)
class _Known:
    """What is remembered of a batch.

    Attributes:
        version: of the descriptor's tables.
        marks: of the sequences.
        num_pages: as of the batch.
        forest: its forest.
        levels: what was packed last.
    """

    version: int
    marks: list[object]
    num_pages: Int64Array
    forest: KnownForest
    levels: _Levels


class HybridTables:
    """Packs batches of one descriptor for hybrid attention. Tensors that it has handed out are never written to."""

    def __init__(self) -> None:
        self._pages = LastPages()
        self._known: dict[tuple[Hashable, ...], _Known] = {}

    def pack(
        self,
        descriptor: CacheDescriptor,
        seq_ids: Sequence[Hashable],
        query_lens: Sequence[int] | None,
        cost_model: CostModel | Literal["auto"] | None,
        num_tokens: Sequence[int] | None,
    ) -> FlashInferHybridData:
        """See `CacheDescriptor.pack_hybrid_for_flashinfer`."""
        key, known = self._look_up(seq_ids)
        if known is None:
            descriptor.refuse_twice(seq_ids)
        version, page_size = descriptor.tables_version, descriptor.page_size
        unchanged = known if known is not None and known.version == version else None
        num_pages = None if unchanged is None else unchanged.num_pages
        batch = asked_batch(descriptor, seq_ids, num_pages, query_lens, num_tokens)
        model = model_of(cost_model)
        marks = list(map(_MARK, batch.found)) if unchanged is None else unchanged.marks
        forest = self._forest(known, marks, batch)
        if known is not None and forest.runs is known.forest.runs:
            marks = known.marks
            levels = self._repacked(known.levels, forest, batch, model, page_size)
        else:
            marks = _marked(batch.found, marks)
            levels = self._packed(forest, _choice(forest, batch, model, page_size), batch, page_size)
        self._remember(key, _Known(version, marks, batch.num_pages, forest, levels))
        return FlashInferHybridData.trusted((*levels.shared, levels.last), levels.order)

    def _look_up(self, seq_ids: Sequence[Hashable]) -> tuple[tuple[Hashable, ...], _Known | None]:
        """The batch as a key, and what is known of it; of what cannot be a batch nothing is."""
        try:
            key = tuple(seq_ids)
            return key, self._known.get(key)
        except TypeError:
            return (), None

    def _remember(self, key: tuple[Hashable, ...], known: _Known) -> None:
        """The last batches, the latest at the end."""
        self._known.pop(key, None)
        self._known[key] = known
        if len(self._known) > _MOST_BATCHES:
            del self._known[next(iter(self._known))]

    def _forest(self, known: _Known | None, marks: list[object], batch: Batch) -> KnownForest:
        """The batch's forest: a known one, or made of one, or made anew."""
        is_same = known is not None and (marks is known.marks or marks == known.marks)
        if known is not None and is_same and known.forest.holds(batch.limits):
            return known.forest
        tables = batch.tables()
        if known is not None and is_same and (forest := known.forest.under(tables, batch.limits)) is not None:
            return forest
        if marks.count(None) * _NEW <= len(marks):
            for old in reversed(self._known.values()):
                number = dict(zip(old.marks, range(len(old.marks)), strict=True))
                before = as_int32(list(map(number.get, marks, repeat(-1)))).astype(np.int64)
                if (forest := old.forest.changed(before, tables, batch.limits)) is not None:
                    return forest
        return KnownForest.built(tables, batch.limits)

    def _repacked(
        self, old: _Levels, forest: KnownForest, batch: Batch, model: CostModel | None, page_size: int
    ) -> _Levels:
        """The batch in levels as before, as far as they are still right."""
        if not _same(old.rows, batch.rows):
            return self._packed(forest, _choice(forest, batch, model, page_size), batch, page_size)
        choice = old.choice
        is_same = choice.lens == _steps(batch.lens, model) and (choice.model is model or choice.model == model)
        # What the forest knows of limits is about shared runs: those of single sequences may have become too long.
        if not is_same or (batch.limits[old.places] < old.begins).any():
            choice = _choice(forest, batch, model, page_size)
            if choice.runs != old.choice.runs:
                return self._packed(forest, choice, batch, page_size)
        counts = batch.counts[old.places]
        kept = old.rows, choice, old.places, old.order, old.shared, old.begins
        return _Levels(*kept, counts, self._last(old, counts, batch, page_size))

    def _packed(self, forest: KnownForest, choice: _Choice, batch: Batch, page_size: int) -> _Levels:
        """The batch in levels, from its forest."""
        runs = choice.runs
        places = forest.order if runs else np.arange(len(batch.lens))
        rows_before = _rows_before(batch, places)
        tables = batch.tables()
        ordered = list(map(tables.__getitem__, places.tolist()))
        shared = shared_levels(runs, ordered, rows_before, page_size)
        begins, counts = pages_above(runs, len(ordered)), batch.counts[places]
        last = HybridLevel.trusted(
            torch.from_numpy(rows_before.astype(np.int32)),
            *self._pages.collected(ordered, begins, counts),
            _last_lens(batch.lens[places], page_size),
        )
        order = torch.from_numpy(places)
        return _Levels(batch.rows, choice, places, order, tuple(shared), begins, counts, last)

    def _last(self, old: _Levels, counts: Int64Array, batch: Batch, page_size: int) -> HybridLevel:
        """The last level of these levels with so many pages at each position."""
        last_lens = _last_lens(batch.lens[old.places], page_size)
        if (counts == old.counts).all():
            return HybridLevel.trusted(old.last.qo_indptr, old.last.kv_page_indptr, old.last.kv_page_indices, last_lens)
        before = old.last.kv_page_indptr, old.last.kv_page_indices
        pages = self._pages.grown(before, old.counts, batch.tables(), old.places, old.begins, counts)
        return HybridLevel.trusted(old.last.qo_indptr, *pages, last_lens)


_MARK = attrgetter("mark")


def _marked(found: Sequence[SequenceData], marks: list[object]) -> list[object]:
    """A mark for each sequence; those without one get it."""
    for i, mark in enumerate(marks):
        if mark is None:
            found[i].mark = marks[i] = object()
    return marks


def _choice(forest: KnownForest, batch: Batch, model: CostModel | None, page_size: int) -> _Choice:
    """Which of the forest's runs to keep, and which lists to cut; asks the model."""
    if model is None:
        return _Choice(None, _steps(batch.lens, None), forest.runs)
    places = forest.order
    its = _rows_before(batch, places), batch.lens[places], batch.limits[places]
    return _Choice(model, _steps(batch.lens, model), runs_to_keep(forest.runs, *its, page_size, model))


def _steps(lens: Int64Array, model: CostModel | None) -> tuple[int, int]:
    """What a cost model may see of lengths: their mean and the longest, in steps; nothing without one."""
    if model is None or not len(lens):
        return 0, 0
    return int(lens.sum()) // (_TOKENS_ALIKE * len(lens)), int(lens.max()) // _TOKENS_ALIKE


def _rows_before(batch: Batch, places: Int64Array) -> Int64Array:
    """Query rows before each position, and all of them."""
    return np.arange(len(places) + 1) if batch.rows is None else summed(batch.rows[places])


def _same(rows: Int64Array | None, others: Int64Array | None) -> bool:
    """Whether they are the same rows."""
    return rows is others or (rows is not None and others is not None and np.array_equal(rows, others))


def _last_lens(lens: Int64Array, page_size: int) -> torch.Tensor:
    """Tokens in the last page of each sequence of so many tokens, at least one."""
    return torch.from_numpy(((lens - 1) % page_size + 1).astype(np.int32))
