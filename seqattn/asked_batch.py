"""What a hybrid pack of a descriptor's sequences is asked for, as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import define

from seqattn.flat_tables import as_int32
from seqattn.hybrid import rows_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy.typing as npt

    from seqattn.descriptor import CacheDescriptor
    from seqattn.pages import PageArray
    from seqattn.sequence import SequenceData

    Int64Array = npt.NDArray[np.int64]

__all__ = ["Batch", "asked_batch"]


@define(slots=True, frozen=True, eq=False)
class Batch:
    """What is asked for.

    Attributes:
        found: the sequences.
        num_pages: entries in use of each table, int64 [batch].
        lens: tokens of each to pack, int64 [batch].
        counts: pages of each to pack, int64 [batch].
        rows: query rows of each, int64 [batch]; None for one each.
        limits: pages of each that others may share, int64 [batch].
    """

    found: Sequence[SequenceData]
    num_pages: Int64Array
    lens: Int64Array
    counts: Int64Array
    rows: Int64Array | None
    limits: Int64Array

    def tables(self) -> list[PageArray]:
        """Of each sequence the pages to pack."""
        if self.counts is self.num_pages:
            return [data.table for data in self.found]
        return [data.table[:count] for data, count in zip(self.found, self.counts.tolist(), strict=True)]


def asked_batch(
    descriptor: CacheDescriptor,
    seq_ids: Sequence[Hashable],
    known: Int64Array | None,
    query_lens: Sequence[int] | None,
    num_tokens: Sequence[int] | None,
) -> Batch:
    """What is asked for; raises what `pack_hybrid_for_flashinfer` raises of lengths and unknown sequences.

    Args:
        descriptor: whose sequences they are.
        seq_ids: as given.
        query_lens: likewise.
        num_tokens: likewise.
        known: `num_pages` of the same batch, if no table has changed since; else None.
    """
    page_size = descriptor.page_size
    found = descriptor.all_of(seq_ids)
    num_pages = known
    if num_pages is None:
        num_pages = as_int32([data.num_pages for data in found]).astype(np.int64)
    if num_tokens is None:
        last_lens = as_int32([data.last_page_len for data in found])
        lens, counts = np.maximum((num_pages - 1) * page_size + last_lens, 0), num_pages
    else:
        _, lens = descriptor.tables(seq_ids, num_tokens)
        counts = -(-lens // page_size)
    if query_lens is None and counts.all():
        return Batch(found, num_pages, lens, counts, None, counts - 1)
    rows = rows_of(query_lens, lens).copy()  # remembered, and the caller's array may be written to
    return Batch(found, num_pages, lens, counts, None if (rows == 1).all() else rows, (lens - rows) // page_size)
