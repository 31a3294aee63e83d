"""Page tables back to back, as attention reads them; written again only where they have changed since the last step.

A step of decoding appends a page to one sequence in `page_size`, here to the first and the third of four. What lies
between two that grew moves by as many pages as were added before it, last part first, each in one `memmove`:

    before   [a a a|b b|c c c|d d]            indptr [0 3 5 8 10]
    after    [a a a A|b b|c c c C|d d]        indptr [0 4 6 10 12]
                      └ by 1 ───┘ └ by 2

That reads and writes the memory which an earlier step left in the processor's cache, and no table but those that grew.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Sequence
from operator import is_
from typing import TYPE_CHECKING

import numpy as np
from attrs import define

from seqattn.buffers import Buffers
from seqattn.page_lists import indptr_of

if TYPE_CHECKING:
    import torch

    from seqattn.pages import PageArray
    from seqattn.sequence import SequenceData

__all__ = ["FlatTables", "Flattened", "as_int32"]

#: of so many tables one may have grown, since the memory was written, for the rest to be moved and not written anew
_MOVED = 4


@define(slots=True, frozen=True, eq=False)
class _Written:
    """What some memory holds: whose tables, and where each begins, int32 [batch + 1]."""

    found: Sequence[SequenceData]
    indptr: PageArray


@define(slots=True, frozen=True, eq=False)
class Flattened:
    """The tables of a batch, back to back.

    Attributes:
        version, seq_ids: as given.
        found: the sequences.
        indices: page numbers, int32 [total].
        indptr: where each sequence begins, int32 [batch + 1].
    """

    version: int
    seq_ids: list[Hashable]
    found: Sequence[SequenceData]
    indices: torch.Tensor
    indptr: torch.Tensor


class FlatTables:
    """Puts page tables back to back, batch after batch. Tensors that somebody still has are never written to."""

    def __init__(self) -> None:
        self._buffers = Buffers()
        self._last: Flattened | None = None

    def of(
        self, seq_ids: list[Hashable], version: int, find: Callable[[list[Hashable]], Sequence[SequenceData]]
    ) -> Flattened:
        """The tables of these sequences.

        Args:
            seq_ids: the batch, in order; not changed by anybody from now on.
            version: grows with every change of any table. Of changes other than pages appended `forget` is told.
            find: the sequences of these ids; may raise.

        Cost: one copy of the tables; a move of them in place if few have grown; O(batch) if none has changed.
        """
        last = self._last
        if last is None or last.version != version or last.seq_ids != seq_ids:
            last = self._last = None  # its memory may serve again, while it is in the processor's cache
            found = find(seq_ids)
            indices, indptr = self._moved(found) or self._copied(found)
            last = self._last = Flattened(version, seq_ids, found, *_as_tensors(indices, indptr))
        return last

    def forget(self) -> None:
        """Some table has been written to, cut, or ended: nothing that was written before is right any more."""
        self._last = None
        self._buffers.forget()

    def joined(self, tables: Sequence[PageArray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Any tables back to back, int32 [total], and where each begins, int32 [batch + 1]."""
        indptr = indptr_of(as_int32([len(table) for table in tables]))
        return _as_tensors(self._joined(tables, indptr), indptr)

    def _moved(self, found: Sequence[SequenceData]) -> tuple[PageArray, PageArray] | None:
        """These tables in memory that has an earlier state of them; None if none has, or they had better be copied."""
        held = self._buffers.reclaim(lambda old: len(old.found) == len(found) and all(map(is_, old.found, found)))
        if held is None:
            return None
        memory, written = held
        indptr = _indptr(found)
        if not _grow(memory, written.indptr, indptr, found):
            return None
        self._buffers.remember(memory, _Written(found, indptr))
        return memory[: indptr.item(-1)], indptr

    def _copied(self, found: Sequence[SequenceData]) -> tuple[PageArray, PageArray]:
        indptr = _indptr(found)
        indices = self._joined([data.table for data in found], indptr)
        self._buffers.remember(indices, _Written(found, indptr))
        return indices, indptr

    def _joined(self, tables: Sequence[PageArray], indptr: PageArray) -> PageArray:
        indices = self._buffers.take(indptr.item(-1))
        if tables:
            np.concatenate(tables, out=indices)
        return indices


def _as_tensors(indices: PageArray, indptr: PageArray) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.from_numpy(indices), torch.from_numpy(indptr)


def _grow(memory: PageArray, old: PageArray, new: PageArray, found: Sequence[SequenceData]) -> bool:
    """Brings tables in memory, which began at `old`, to where `new` says.

    Returns:
        False, and nothing is written, if that is more work than to write all of them, or too much for the memory.
    """
    moved = new - old
    grown = np.flatnonzero(moved[1:] != moved[:-1]).tolist()
    if len(grown) * _MOVED > len(found) or new.item(-1) > len(memory) or (moved[1:] < moved[:-1]).any():
        return False
    view, end = memory.data, old.item(-1)
    for index in reversed(grown):
        begin, by = old.item(index + 1), moved.item(index + 1)
        view[begin + by : end + by] = view[begin:end]
        added = by - moved.item(index)
        memory[begin + by - added : begin + by] = found[index].table[-added:]
        end = begin
    return True


def _indptr(found: Sequence[SequenceData]) -> PageArray:
    return indptr_of(as_int32([data.num_pages for data in found]))


def as_int32(values: list[int]) -> PageArray:
    """`np.array(values, dtype=np.int32)` in two thirds of the time for hundreds of them, where it matters."""
    return np.frombuffer(bytearray(struct.pack(f"{len(values)}i", *values)), np.int32)
