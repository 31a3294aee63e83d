"""Adding tokens to sequences in three steps, so that all of it happens or nothing: plan, copy, write.

    plan    what it takes: changes nothing, raises what is wrong with what is asked for
    copy    last pages that are shared and partly filled, to the first of the new pages: may fail, tables are as before
    write   the tables: cannot fail

Between plan and copy whoever asks takes the pages, from free ones or from those that nobody uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import define

from seqattn.counts import as_count
from seqattn.errors import LengthError
from seqattn.sequence import SequenceData

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from seqattn.descriptor import CacheDescriptor
    from seqattn.pages import PageArray

__all__ = ["Growth"]


@define(slots=True)
class Growth:
    """What it takes to add tokens to sequences of a descriptor.

    Attributes:
        descriptor: whose sequences they are.
        seq_ids: of the sequences; an unknown one starts.
        num_new_pages: pages behind the last one of each, copies left out.
        last_page_lens: tokens in the last page of each afterwards.
        copy_ids: sequences whose last page is shared and partly filled.
        copy_src: that page of each.
        copy_slots: tokens in it.
        num_pages: pages to take: one for each copy, then those behind the last ones.
    """

    descriptor: CacheDescriptor
    seq_ids: Sequence[Hashable]
    num_new_pages: list[int]
    last_page_lens: list[int]
    copy_ids: list[Hashable]
    copy_src: list[int]
    copy_slots: list[int]
    num_pages: int

    @classmethod
    def planned(cls, descriptor: CacheDescriptor, seq_ids: Sequence[Hashable], seq_new_lens: Sequence[int]) -> Growth:
        """What `CacheDescriptor.allocate` would need; raises what it raises, but for NoPageError. O(sequences)."""
        if len(seq_ids) != len(seq_new_lens):
            raise LengthError(f"{len(seq_ids)} sequence ids but {len(seq_new_lens)} lengths")
        descriptor.refuse_twice(seq_ids)
        manager, running = descriptor.cache_manager, descriptor.seq_id_to_data
        page_size, ref_count = manager.page_size, manager.ref_count
        growth = cls(descriptor, seq_ids, [], [], [], [], [], 0)
        for seq_id, new_len in zip(seq_ids, seq_new_lens, strict=True):
            if type(new_len) is not int or new_len < 1:
                as_count(f"the length to add to sequence {seq_id!r}", new_len, 1)
            data = running.get(seq_id)
            used = 0 if data is None else data.last_page_len
            if data is not None and 0 < used < page_size and ref_count.item(data.last_page) > 1:
                growth.copy_ids.append(seq_id)
                growth.copy_src.append(data.last_page)
                growth.copy_slots.append(used)
            full, last = divmod(used + new_len - 1, page_size)
            full += not used
            growth.num_new_pages.append(full)
            growth.last_page_lens.append(last + 1)
            growth.num_pages += full
        growth.num_pages += len(growth.copy_ids)
        return growth

    def copy(self, pages: PageArray) -> None:
        """Copies the shared last pages to the first of `pages`; what may fail, fails here."""
        if self.copy_ids:
            dst = pages[: len(self.copy_ids)].tolist()
            self.descriptor.cache_manager.copy_page_slots(self.copy_src, dst, self.copy_slots)

    def write(self, pages: PageArray) -> None:
        """Writes the tables; cannot fail. Takes over one reference to each of `pages`, int32 [num_pages]."""
        descriptor, at = self.descriptor, len(self.copy_ids)
        running = descriptor.seq_id_to_data
        if at:
            for seq_id, src, dst in zip(self.copy_ids, self.copy_src, pages[:at].tolist(), strict=True):
                running[seq_id].write_last(dst)
                descriptor.cache_manager.drop(np.array([src], dtype=np.int32))
            descriptor.note_rewrite()
        elif self.num_pages:
            descriptor.tables_version += 1
        for seq_id, count, last in zip(self.seq_ids, self.num_new_pages, self.last_page_lens, strict=True):
            data = running.get(seq_id)
            if data is None:
                data = running[seq_id] = SequenceData((), 0)
            if count:
                data.append(pages[at : at + count])
                at += count
            data.last_page_len = last
