"""Page tables back to back, as attention reads them; written again only where they have changed since the last step.

A step of decoding appends a page to one sequence in `page_size`, here to the first and the third of four. What lies
between two that grew moves by as many pages as were added before it, last part first, each in one `memmove`:

    before   [a a a|b b|c c c|d d]            indptr [0 3 5 8 10]
    after    [a a a A|b b|c c c C|d d]        indptr [0 4 6 10 12]
                      └ by 1 ───┘ └ by 2

That reads and writes the memory which the last step left in the processor's cache, and no table but those that grew.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from attrs import define

from seqattn.buffers import Buffers

if TYPE_CHECKING:
    import torch

    from seqattn.pages import PageArray
    from seqattn.sequence import SequenceData

__all__ = ["FlatTables", "Flattened", "as_int32"]

#: of so many tables one may have grown for the rest to be moved, not written anew
_MOVED = 4


@define(slots=True, eq=False)
class _Written:
    """What some memory holds: whose tables, as of which version of them, and where each begins, int32 [batch + 1]."""

    version: int
    seq_ids: list[Hashable]
    found: Sequence[SequenceData]
    indptr: PageArray


@define(slots=True, eq=False)
class Flattened:
    """The tables of a batch: its sequences, page numbers int32 [total] and where each begins, int32 [batch + 1]."""

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
        self,
        seq_ids: list[Hashable],
        version: int,
        rewritten: int,
        find: Callable[[list[Hashable]], Sequence[SequenceData]],
    ) -> Flattened:
        """The tables of these sequences.

        Args:
            seq_ids: the batch, in order; not changed by anybody from now on.
            version: grows with every change of any table …
            rewritten: … and this is what it was at the last change other than pages that were appended.
            find: the sequences of these ids; may raise.

        Cost: one copy of the tables; a move of them in place if few have grown; O(batch) if none has changed.
        """
        last = self._last
        if last is None or last.version != version or last.seq_ids != seq_ids:
            last = self._last = None  # its memory may serve again, while it is in the processor's cache
            last = self._last = self._moved(seq_ids, version, rewritten) or self._copied(seq_ids, version, find)
        return last

    def _moved(self, seq_ids: list[Hashable], version: int, rewritten: int) -> Flattened | None:
        """These tables in memory that has an earlier state of them; None if none has, or they had better be copied."""
        found = self._buffers.holding(lambda old: old.version >= rewritten and old.seq_ids == seq_ids)
        if found is None:
            return None
        memory, written = found
        indices = _grown(memory, written, version)
        return None if indices is None else _as_tensors(written, indices)

    def _copied(
        self, seq_ids: list[Hashable], version: int, find: Callable[[list[Hashable]], Sequence[SequenceData]]
    ) -> Flattened:
        found = find(seq_ids)
        written = _Written(version, seq_ids, found, _indptr(found))
        return _as_tensors(written, self._joined([data.table for data in found], written.indptr, written))

    def joined(self, tables: Sequence[PageArray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Any tables back to back, int32 [total], and where each begins, int32 [batch + 1]."""
        import torch

        indptr = _summed([len(table) for table in tables])
        return torch.from_numpy(self._joined(tables, indptr, None)), torch.from_numpy(indptr)

    def _joined(self, tables: Sequence[PageArray], indptr: PageArray, written: _Written | None) -> PageArray:
        indices = self._buffers.take(indptr.item(-1), written)
        if tables:
            np.concatenate(tables, out=indices)
        return indices


def _as_tensors(written: _Written, indices: PageArray) -> Flattened:
    import torch

    tensors = torch.from_numpy(indices), torch.from_numpy(written.indptr)
    return Flattened(written.version, written.seq_ids, written.found, *tensors)


def _grown(memory: PageArray, written: _Written, version: int) -> PageArray | None:
    """Brings memory that holds the same tables up to date; None, and nothing has changed, if it had better be anew."""
    old, new = written.indptr, _indptr(written.found)
    moved = new - old
    grown = np.flatnonzero(moved[1:] != moved[:-1]).tolist()
    if len(grown) * _MOVED > len(written.found) or new.item(-1) > len(memory):
        return None
    view, end = memory.data, old.item(-1)
    for index in reversed(grown):
        begin, by = old.item(index + 1), moved.item(index + 1)
        view[begin + by : end + by] = view[begin:end]
        added = by - moved.item(index)
        memory[begin + by - added : begin + by] = written.found[index].table[-added:]
        end = begin
    written.version, written.indptr = version, new
    return memory[: new.item(-1)]


def _indptr(found: Sequence[SequenceData]) -> PageArray:
    return _summed([data.num_pages for data in found])


def _summed(lens: list[int]) -> PageArray:
    """Where each of so many begins, and the end: int32 [len + 1]."""
    indptr = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(as_int32(lens), out=indptr[1:])
    return indptr


def as_int32(values: list[int]) -> PageArray:
    """`np.array(values, dtype=np.int32)` in two thirds of the time for hundreds of them, where it matters."""
    return np.frombuffer(bytearray(struct.pack(f"{len(values)}i", *values)), np.int32)
