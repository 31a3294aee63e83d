"""Sequences over pages: which sequence holds which pages, and how many tokens they have.

    allocate([1], [10])  ──▶  seq 1: pages [0 1 2], last_page_len 2        page_size 4
    fork(1, 2)           ──▶  seq 2: pages [0 1 3], last_page_len 2        full pages shared, the partial one copied
    truncate(2, 6)       ──▶  seq 2: pages [0 1],   last_page_len 2        page 1 is shared and now cut
    extend(2, 1)         ──▶  seq 2: pages [0 3],   last_page_len 3        so it is copied before it is written

Invariants (`check()`):

- S1 `num_pages == ceil(num_tokens / page_size)`; a sequence holds no page twice.
- S2 a sequence with pages has `1 <= last_page_len <= page_size`; one without has 0.
- S3 only a page that a sequence holds alone is ever written: the first slot that growth adds lies in such a page.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

import numpy as np
from attrs import define, field

from seqattn.counts import as_count
from seqattn.errors import (
    BadValueError,
    DuplicateSequenceError,
    InvariantError,
    LengthError,
    PageError,
    UnknownSequenceError,
)
from seqattn.flat_tables import FlatTables, as_int32
from seqattn.growth import Growth
from seqattn.page_lists import concatenate, has_twice
from seqattn.pages import PageAllocator
from seqattn.sequence import SequenceData

if TYPE_CHECKING:
    from seqattn.hybrid import CostModel
    from seqattn.hybrid_tables import HybridTables
    from seqattn.packed import FlashInferHybridData, FlashInferPackedData
    from seqattn.pages import PageArray, PageList

__all__ = ["CacheDescriptor", "SequenceData"]


@define(slots=True)
class CacheDescriptor:
    """Keeps the page tables of sequences and packs them for attention.

    Each sequence holds one reference to each of its pages. Sequence ids may be any hashable value.

    Args:
        cache_manager: where pages come from; a `PageAllocator` is enough, memory is not needed.
    """

    cache_manager: PageAllocator
    seq_id_to_data: dict[Hashable, SequenceData] = field(factory=dict)
    _flat: FlatTables = field(init=False, factory=FlatTables, repr=False, eq=False)
    _hybrid: HybridTables | None = field(init=False, default=None, repr=False, eq=False)
    #: counts the changes of page tables, so that packing knows when only lengths have changed
    tables_version: int = field(init=False, default=0, repr=False, eq=False)

    @property
    def page_size(self) -> int:
        """Token slots in a page."""
        return self.cache_manager.page_size

    def num_tokens(self, seq_id: Hashable) -> int:
        """Tokens of a sequence.

        Raises:
            UnknownSequenceError: no such sequence.
        """
        return self.data_of(seq_id).num_tokens(self.page_size)

    def data_of(self, seq_id: Hashable) -> SequenceData:
        """The sequence's entry in `seq_id_to_data`.

        Raises:
            UnknownSequenceError: no such sequence.
        """
        try:
            return self.seq_id_to_data[seq_id]
        except (KeyError, TypeError):
            raise UnknownSequenceError(seq_id) from None

    def all_of(self, seq_ids: Sequence[Hashable]) -> list[SequenceData]:
        """`data_of` for a batch."""
        try:
            if len(seq_ids) > 1:
                return list(itemgetter(*seq_ids)(self.seq_id_to_data))
            return [self.seq_id_to_data[seq_id] for seq_id in seq_ids]
        except (KeyError, TypeError):
            return [self.data_of(seq_id) for seq_id in seq_ids]

    # -- growing ------------------------------------------------------------------------------------------------------

    def allocate(self, seq_ids: Sequence[Hashable], seq_new_lens: Sequence[int]) -> None:
        """Adds tokens to sequences, new or running; takes the pages for them.

        Args:
            seq_ids: each at most once; an unknown id starts a sequence.
            seq_new_lens: tokens to add to each, at least 1.

        Raises:
            NoPageError: too few free pages.
            LengthError: lists of different lengths, or a length below 1.
            DuplicateSequenceError: an id is named twice.

        All or nothing. A last page that is shared and partly filled is copied first.
        """
        growth = Growth.planned(self, seq_ids, seq_new_lens)
        pages = self.cache_manager.take(growth.num_pages)
        try:
            growth.copy(pages)
        except BaseException:
            self.cache_manager.drop(pages)
            raise
        growth.write(pages)

    def allocate_decoding(self, seq_ids: Sequence[Hashable]) -> None:
        """Adds one token to each of these running sequences; `allocate` otherwise.

        Raises:
            UnknownSequenceError: an id has no sequence.
        """
        self.all_of(seq_ids)
        self.allocate(seq_ids, [1] * len(seq_ids))

    def extend(self, seq_id: Hashable, num_tokens: int) -> None:
        """Adds tokens to one running sequence; `allocate` otherwise.

        Raises:
            UnknownSequenceError: no such sequence.
        """
        self.data_of(seq_id)
        self.allocate([seq_id], [num_tokens])

    # -- sharing ------------------------------------------------------------------------------------------------------

    def fork(self, seq_id: Hashable, new_seq_id: Hashable) -> None:
        """Starts a sequence with the same tokens: full pages are shared, the partly filled last page is copied.

        Raises:
            UnknownSequenceError: no sequence `seq_id`.
            DuplicateSequenceError: `new_seq_id` is running.
            NoPageError: the copy needs a page and none is free; nothing changes.

        Cost: O(pages) for the references, one copy of at most a page.
        """
        data = self.data_of(seq_id)
        pages = self.cache_manager.take(self.pages_to_fork(seq_id, new_seq_id))
        try:
            self.copy_tail(seq_id, pages)
        except BaseException:
            self.cache_manager.drop(pages)
            raise
        self.add(new_seq_id, SequenceData(self.fork_table(seq_id, pages), data.last_page_len))

    def pages_to_fork(self, seq_id: Hashable, new_seq_id: Hashable) -> int:
        """How many pages `fork` takes: 1 if the last page is partly filled, else 0. Raises what `fork` raises."""
        data = self.data_of(seq_id)
        self.refuse_running(new_seq_id)
        return int(0 < data.last_page_len < self.page_size)

    def copy_tail(self, seq_id: Hashable, pages: PageArray) -> None:
        """Copies the partly filled last page to `pages`, int32 [0 or 1] as `pages_to_fork` says."""
        if len(pages):
            data = self.seq_id_to_data[seq_id]
            self.cache_manager.copy_page_slots([data.last_page], pages.tolist(), [data.last_page_len])

    def fork_table(self, seq_id: Hashable, pages: PageArray) -> PageArray:
        """The page table of a fork, int32, after the copy: full pages, which it refs, then `pages`; cannot fail."""
        table = self.seq_id_to_data[seq_id].table.copy()
        num_shared = len(table) - len(pages)
        self.cache_manager.hold(table[:num_shared])
        table[num_shared:] = pages
        return table

    def attach(self, seq_id: Hashable, pages: PageList, num_tokens: int) -> None:
        """Starts a sequence on pages that the caller holds, and takes over one of the caller's references to each.

        Args:
            seq_id: an id that is not running.
            pages: exactly `ceil(num_tokens / page_size)` pages in use, none twice; `attach(id, [], 0)` is legal.
            num_tokens: tokens in them.

        Raises:
            DuplicateSequenceError, LengthError, PageError: as above; nothing changes and the caller keeps its
                references.
        """
        self.refuse_running(seq_id)
        table = self.cache_manager.as_pages(pages)
        num_tokens = as_count("num_tokens", num_tokens)
        needed = -(-num_tokens // self.page_size)
        if len(table) != needed:
            raise LengthError(f"{num_tokens} tokens take {needed} pages of {self.page_size}, not {len(table)}")
        if has_twice(table):
            raise PageError(f"pages {table.tolist()} of sequence {seq_id!r} name a page twice")
        if len(table) and not self.cache_manager.ref_count[table].all():
            page = int(table[self.cache_manager.ref_count[table].argmin()])
            raise PageError(f"page {page} is free and cannot be attached: allocate or ref it first")
        self.cache_manager.refuse_more_than_held(table)
        self.cache_manager.num_outside_refs -= len(table)
        self.seq_id_to_data[seq_id] = SequenceData(table, num_tokens - (needed - 1) * self.page_size if needed else 0)
        self.tables_version += 1

    def add(self, seq_id: Hashable, data: SequenceData) -> None:
        """Enters a sequence made elsewhere, which holds a reference to each of its pages; unchecked."""
        self.seq_id_to_data[seq_id] = data
        self.tables_version += 1

    def remove(self, seq_id: Hashable) -> SequenceData:
        """Takes a sequence out without giving its references back: they are the caller's now; unchecked."""
        self.note_rewrite()
        return self.seq_id_to_data.pop(seq_id)

    def note_rewrite(self) -> None:
        """A table has changed other than by pages appended to it."""
        self.tables_version += 1
        self._flat.forget()

    # -- shrinking ----------------------------------------------------------------------------------------------------

    def truncate(self, seq_id: Hashable, num_tokens: int) -> None:
        """Keeps the first `num_tokens` tokens and gives the pages after them back.

        Allocates nothing: a cut inside a shared page keeps sharing it, and the next growth copies it first.

        Raises:
            UnknownSequenceError: no such sequence.
            LengthError: negative, or more tokens than the sequence has.
        """
        data = self.data_of(seq_id)
        num_tokens = self.check_cut(seq_id, num_tokens)
        keep = -(-num_tokens // self.page_size)
        if keep < data.num_pages:
            self.cache_manager.drop(data.table[keep:])
            data.cut(keep)
            self.note_rewrite()
        data.last_page_len = num_tokens - (keep - 1) * self.page_size if keep else 0

    def check_cut(self, seq_id: Hashable, num_tokens: int) -> int:
        """`num_tokens` as an int in [0, tokens of the sequence]; raises LengthError otherwise."""
        num_tokens, have = as_count("num_tokens", num_tokens), self.num_tokens(seq_id)
        if num_tokens > have:
            raise LengthError(f"sequence {seq_id!r} has {have} tokens and cannot be cut to {num_tokens}")
        return num_tokens

    def release(self, seq_ids: Sequence[Hashable]) -> None:
        """Ends sequences and gives their references back; O(pages).

        Raises:
            UnknownSequenceError, DuplicateSequenceError: for any of the ids; nothing is released then.
        """
        self.refuse_twice(seq_ids)
        self.all_of(seq_ids)
        for seq_id in seq_ids:
            self.cache_manager.drop(self.seq_id_to_data.pop(seq_id).table)
        self.note_rewrite()

    # -- packing ------------------------------------------------------------------------------------------------------

    def pack_for_flashinfer(
        self, seq_ids: Sequence[Hashable], *, num_tokens: Sequence[int] | None = None
    ) -> FlashInferPackedData:
        """The page tables of a batch as flat int32 CPU tensors.

        Args:
            seq_ids: the batch, in order.
            num_tokens: tokens of each sequence to pack, at most its length, when part of it is left out.

        Returns:
            `kv_page_indices` [total pages], `kv_page_indptr` [batch + 1], `kv_last_page_len` [batch]. Never to
            be written to: later packs of the batch share them, or are made from what is in their memory.

        Raises:
            UnknownSequenceError: an id has no sequence.
            LengthError: `num_tokens` does not fit.

        Cost: one copy of the page tables. For a batch packed before: one move of them in place if a few have grown, and
        O(batch) if only lengths have changed.
        """
        import torch

        from seqattn.packed import FlashInferPackedData

        if num_tokens is not None:
            tables, lens = self.tables(seq_ids, num_tokens)
            last = (lens - 1) % self.page_size + (lens > 0)
            last[lens == 0] = 0
            return FlashInferPackedData.trusted(*self._flat.joined(tables), torch.from_numpy(last.astype(np.int32)))
        flat = self._flat.of(list(seq_ids), self.tables_version, self.all_of)
        last_lens = as_int32([data.last_page_len for data in flat.found])
        return FlashInferPackedData.trusted(flat.indices, flat.indptr, torch.from_numpy(last_lens))

    def pack_hybrid_for_flashinfer(
        self,
        seq_ids: Sequence[Hashable],
        *,
        query_lens: Sequence[int] | None = None,
        cost_model: CostModel | Literal["auto"] | None = None,
        num_tokens: Sequence[int] | None = None,
    ) -> FlashInferHybridData:
        """The batch as levels of shared and unique pages, so that attention reads a shared prefix once.

        Sequences share what their page tables have in common from the first page on; no tree is needed. Never to be
        written to: while tables only grow later packs give the same levels out again, and cost little (docs/design.md).

        Args:
            seq_ids: the batch, each id once, in the caller's order.
            query_lens: query rows of each sequence; None for one each. New tokens stay in the last level.
            cost_model: None keeps every shared run; `"auto"` or a `CostModel` drops those that do not pay, and cuts
                lists that are much longer than the others where that does (docs/gpu.md).
            num_tokens: tokens of each sequence to pack, at most its length.

        Raises:
            UnknownSequenceError, DuplicateSequenceError, LengthError: as above.
        """
        from seqattn.hybrid_tables import HybridTables

        self._hybrid = self._hybrid or HybridTables()
        return self._hybrid.pack(self, seq_ids, query_lens, cost_model, num_tokens)

    def tables(
        self, seq_ids: Sequence[Hashable], num_tokens: Sequence[int] | None = None
    ) -> tuple[list[PageArray], np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Page tables (int32 views) and lengths (int64 [batch]) of a batch, cut to `num_tokens` if given."""
        found = self.all_of(seq_ids)
        page_size = self.page_size
        if num_tokens is None:
            return [d.table for d in found], np.array([d.num_tokens(page_size) for d in found], dtype=np.int64)
        if len(num_tokens) != len(found):
            raise LengthError(f"{len(found)} sequence ids but {len(num_tokens)} lengths in num_tokens")
        lens = [self.check_cut(seq_id, n) for seq_id, n in zip(seq_ids, num_tokens, strict=True)]
        tables = [d.table[: -(-n // page_size)] for d, n in zip(found, lens, strict=True)]
        return tables, np.array(lens, dtype=np.int64)

    # -- proof --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Recomputes S1 and S2, and P1 to P3 with the sequences as known holders; O(pages).

        Raises:
            InvariantError: naming the invariant that does not hold.
        """
        for seq_id, data in self.seq_id_to_data.items():
            drawing = f"sequence {seq_id!r}: {data!r}"
            if has_twice(data.table):
                raise InvariantError("S1", f"sequence {seq_id!r} holds a page twice", drawing)
            if not int(data.num_pages > 0) <= data.last_page_len <= (self.page_size if data.num_pages else 0):
                raise InvariantError("S2", f"last_page_len {data.last_page_len} does not fit", drawing)
        self.cache_manager.check(self.held_pages())

    def held_pages(self) -> PageArray:
        """Every page that a sequence holds, int32, once for each sequence that holds it."""
        return concatenate(data.table for data in self.seq_id_to_data.values())

    def refuse_running(self, seq_id: Hashable) -> None:
        """Raises DuplicateSequenceError if the id is in use, BadValueError if it cannot be an id."""
        try:
            running = seq_id in self.seq_id_to_data
        except TypeError as error:
            raise BadValueError(f"a sequence id must be hashable, not {seq_id!r}: {error}") from None
        if running:
            raise DuplicateSequenceError(seq_id)

    def refuse_twice(self, seq_ids: Sequence[Hashable]) -> None:
        """Raises DuplicateSequenceError if an id is named twice, BadValueError if one cannot be an id."""
        try:
            num_different = len(set(seq_ids))
        except TypeError as error:
            raise BadValueError(f"sequence ids must be hashable, not {seq_ids!r}: {error}") from None
        if num_different < len(seq_ids):
            twice = next(seq_id for i, seq_id in enumerate(seq_ids) if seq_id in seq_ids[:i])
            raise DuplicateSequenceError(twice, "is named twice in one call: name each sequence once")
