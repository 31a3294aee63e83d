"""Where the new tokens of a batch go: the tails of its sequences.

page_size 4, one sequence, pages [7 2 5], last_page_len 2: 10 tokens, of which the last 3 are appended
token   0 1 2 3   4 5 6 7   8 9
page    7         2         5
written                 ^   ^ ^      slots (2, 3), (5, 0), (5, 1)

One step writes the same places in every layer, so what was found for the first layer is kept and compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import define

from seqattn.errors import LengthError, PageError, TensorError
from seqattn.indptr import to_numpy

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.packed import FlashInferPackedData
    from seqattn.pages import PageArray

    Int64Array = npt.NDArray[np.int64]

__all__ = ["Tail", "append_indptr_of", "refuse_same_slot", "refuse_twice", "tail_of"]


@define(slots=True, frozen=True, eq=False)
class Tail:
    """Where new tokens go, and what this was found from.

    Attributes:
        pages: the page of each token, int32 [n].
        offsets: its slot in that page, int64 [n].
        written_pages: each written page, once for each sequence that writes it, int32.
        packed: the batch.
        append_indptr: where the new tokens of each sequence begin, int64 [batch + 1].
    """

    pages: PageArray
    offsets: Int64Array
    written_pages: PageArray
    packed: FlashInferPackedData
    append_indptr: Int64Array

    def is_of(self, packed: FlashInferPackedData, append_indptr: torch.Tensor) -> bool:
        """Whether this is the tail of the same packed data, whose tensors nobody writes, and the same new tokens."""
        if self.packed is not packed or not isinstance(append_indptr, torch.Tensor):
            return False
        on_cpu = append_indptr.device.type == "cpu" and append_indptr.dtype in (torch.int32, torch.int64)
        return on_cpu and np.array_equal(self.append_indptr, append_indptr.detach().numpy())


def tail_of(packed: FlashInferPackedData, append_indptr: Int64Array, page_size: int) -> Tail:
    """Page and slot of each new token; raises LengthError if a sequence has fewer tokens than are appended to it."""
    lengths, num_new = packed.num_tokens(page_size), np.diff(append_indptr)
    if (num_new > lengths).any():
        i = int((num_new > lengths).argmax())
        raise LengthError(
            f"sequence {i} of the batch has {lengths[i]} tokens but {num_new[i]} are appended: "
            "packed lengths include the new tokens, so allocate, then pack, then append"
        )
    indices, first = to_numpy(packed.kv_page_indices), to_numpy(packed.kv_page_indptr)[:-1].astype(np.int64)
    # Row i of sequence b is its token lengths[b] - append_indptr[b + 1] + i.
    positions = np.arange(append_indptr[-1]) + np.repeat(lengths - append_indptr[1:], num_new)
    pages = indices[np.repeat(first, num_new) + positions // page_size]
    first_written, end_written = (lengths - num_new) // page_size, -(-lengths // page_size)
    num_written = np.where(num_new > 0, end_written - first_written, 0)
    ends = np.cumsum(num_written)
    written_at = np.arange(num_written.sum()) + np.repeat(first + first_written - (ends - num_written), num_written)
    return Tail(pages, positions % page_size, indices[written_at], packed, append_indptr)


def refuse_twice(written_pages: PageArray) -> None:
    """Refuses a page that would be written for two sequences; raises PageError."""
    if len(set(written_pages.tolist())) == len(written_pages):  # for few pages faster than sorting them
        return
    pages, times = np.unique(written_pages, return_counts=True)
    raise PageError(f"page {pages[times.argmax()]} would be written for {times.max()} sequences of the batch")


def refuse_same_slot(places: PageArray, page_size: int) -> None:
    """Refuses a slot that would be written twice; raises PageError.

    Args:
        places: page and slot of each row, int32 [2, rows].
        page_size: token slots in a page.
    """
    slots = places[0].astype(np.int64) * page_size + places[1]
    if len(set(slots.tolist())) == len(slots):
        return
    different, times = np.unique(slots, return_counts=True)
    page, slot = divmod(int(different[times.argmax()]), page_size)
    raise PageError(f"slot {slot} of page {page} would be written for {times.max()} sequences of the batch")


def append_indptr_of(append_indptr: torch.Tensor, num_sequences: int) -> Int64Array:
    """The offsets of a batch's new tokens, int64 [num_sequences + 1]; a copy. Raises TensorError or LengthError."""
    # Callers without type checks pass lists and arrays.
    given: object = append_indptr
    if not isinstance(given, torch.Tensor) or given.dtype not in (torch.int32, torch.int64) or given.ndim != 1:
        seen = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
        raise TensorError(f"append_indptr_cpu must be an int32 or int64 tensor with one axis, not {seen}")
    if given.device.type != "cpu":
        raise TensorError(f"append_indptr_cpu is on {given.device}: build it on the CPU")
    indptr: Int64Array = to_numpy(given).astype(np.int64)
    if len(indptr) != num_sequences + 1:
        raise LengthError(f"append_indptr_cpu has {len(indptr)} entries, not {num_sequences} sequences + 1")
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise LengthError(f"append_indptr_cpu must start at 0 and never decrease, not {indptr.tolist()}")
    return indptr
