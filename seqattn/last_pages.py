"""The pages of a hybrid batch's last level: what each sequence has besides the shared levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from seqattn.buffers import Buffers
from seqattn.page_lists import indptr_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.pages import PageArray

    Int64Array = npt.NDArray[np.int64]
    Pages = tuple[torch.Tensor, torch.Tensor]

__all__ = ["LastPages"]

#: of so many tables one may have grown for the pages to be moved, and not collected from all tables
_MOVED = 4


class LastPages:
    """Makes them, in memory that nobody looks at any more; tensors that somebody still has are never written to."""

    def __init__(self) -> None:
        self._buffers = Buffers()

    def collected(self, tables: list[PageArray], begins: Int64Array, counts: Int64Array) -> Pages:
        """Where each sequence's own pages begin, int32 [batch + 1], and these pages, int32.

        Args:
            tables: in group order.
            begins: pages of each in the levels above, int64 [batch].
            counts: pages of each, int64 [batch].
        """
        indptr = indptr_of(counts - begins)
        indices = self._buffers.take(indptr.item(-1))
        if tables:
            own = [table[begin:] for table, begin in zip(tables, begins.tolist(), strict=True)]
            np.concatenate(own, out=indices)
        return torch.from_numpy(indptr), torch.from_numpy(indices)

    def grown(
        self,
        old: Pages,
        old_counts: Int64Array,
        tables: list[PageArray],
        places: Int64Array,
        begins: Int64Array,
        counts: Int64Array,
    ) -> Pages:
        """The same from what they were when there were `old_counts`, and from the tables that have grown since.

        Args:
            old: what they were.
            old_counts: pages of each sequence then, int64 [batch].
            tables: in the caller's order.
            places: number of the sequence at each position, int64 [batch].
            begins: as above, and as they were.
            counts: as above.
        """
        changed = np.flatnonzero(counts != old_counts)
        if len(changed) * _MOVED > len(counts) or (counts[changed] < old_counts[changed]).any():
            return self.collected([tables[i] for i in places.tolist()], begins, counts)
        indptr, before, source = indptr_of(counts - begins), old[0].numpy(), old[1].numpy()
        memory, at = self._buffers.take(indptr.item(-1)), 0
        for i in changed.tolist():
            end, stop, added = before.item(i + 1), indptr.item(i + 1), counts.item(i) - old_counts.item(i)
            memory[stop - added - (end - at) : stop - added] = source[at:end]
            memory[stop - added : stop] = tables[places.item(i)][-added:]
            at = end
        memory[len(memory) - (len(source) - at) :] = source[at:]
        return torch.from_numpy(indptr), torch.from_numpy(memory)
