"""The paged KV cache: page numbers and counts, with the key and value memory behind them.

    key_cache, NHD  [num_pages, page_size, num_heads, head_dim]      slot s of page p is key_cache[p, s]
    key_cache, HND  [num_pages, num_heads, page_size, head_dim]      slot s of page p is key_cache[p, :, s]

With more than one layer both have a leading layer axis. `append_kv` writes the tail of each sequence:

    page_size 4, one sequence, pages [7 2 5], last_page_len 2: 10 tokens, of which the last 3 are appended
    token   0 1 2 3   4 5 6 7   8 9
    page    7         2         5
    written                 ^   ^ ^      slots (2, 3), (5, 0), (5, 1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import define

from seqattn.counts import as_count, positive
from seqattn.errors import BadValueError, LengthError, PageError, SharedPageError, TensorError
from seqattn.indptr import to_numpy, validate_last
from seqattn.packed import FlashInferPackedData
from seqattn.pages import PageAllocator

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.pages import PageArray, PageList

    Int64Array = npt.NDArray[np.int64]

__all__ = ["PagedKVCacheManager", "as_bits"]

#: a dtype of equal width that every torch operation on indices supports
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PagedKVCacheManager(PageAllocator):
    """An allocator of pages and the KV tensors that the pages stand for.

    Args:
        num_pages: pages in all, at least 1.
        page_size: token slots in a page.
        num_heads: KV heads of each layer.
        head_dim: elements of a head.
        dtype: any torch dtype that can be stored; float8 too.
        device: where the tensors live: an int (CUDA index), a string or a torch.device.
        kv_layout: "NHD" or "HND", as drawn at the top of this file.
        num_layers: layers; the tensors have a layer axis if there is more than one.

    Attributes:
        key_cache, value_cache: the memory, zeros at first, so that no slot ever holds NaN by chance. One layer:
            4 axes; more: 5, the layer first.
        device: the torch.device of the tensors.

    Raises:
        BadValueError: a size below 1, a layout that is neither, or a device that is none.
        TensorError: not a dtype, or one that cannot be stored.

    Cost: `2 * num_layers * num_pages * page_size * num_heads * head_dim` elements of memory.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | int,
        kv_layout: str = "NHD",
        *,
        num_layers: int = 1,
    ) -> None:
        super().__init__(num_pages, page_size)
        self.num_heads = positive("num_heads", num_heads)
        self.head_dim = positive("head_dim", head_dim)
        self.num_layers = positive("num_layers", num_layers)
        self.dtype = _storable(dtype)
        self.kv_layout = kv_layout
        if kv_layout not in ("NHD", "HND"):
            raise BadValueError(f"kv_layout must be 'NHD' or 'HND', not {kv_layout!r}")
        shape = [self.page_size, self.num_heads] if kv_layout == "NHD" else [self.num_heads, self.page_size]
        shape = [self.num_pages, *shape, self.head_dim]
        if self.num_layers > 1:
            shape = [self.num_layers, *shape]
        self.key_cache = torch.zeros(shape, dtype=dtype, device=_device(device))
        self.value_cache = torch.zeros_like(self.key_cache)
        self.device = self.key_cache.device

    def get_memory_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`key_cache` and `value_cache` themselves, all layers."""
        return self.key_cache, self.value_cache

    def layer_tensors(self, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, 4 axes in the manager's own layout; views.

        Raises:
            LengthError: `layer` is not in [0, num_layers).
        """
        if as_count("layer", layer) >= self.num_layers:
            raise LengthError(f"layer {layer} is not in [0, {self.num_layers})")
        if self.num_layers == 1:
            return self.key_cache, self.value_cache
        return self.key_cache[layer], self.value_cache[layer]

    def append_kv(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        flashinfer_data: FlashInferPackedData,
        append_indptr_cpu: torch.Tensor,
        *,
        layer: int = 0,
    ) -> None:
        """Writes keys and values of new tokens into the tail of each sequence, as drawn at the top of this file.

        The packed lengths include the new tokens: grow the sequences, pack them, then append.

        Args:
            keys: [n, num_heads, head_dim] of the cache's dtype, on its device.
            values: likewise.
            flashinfer_data: the batch as packed by its descriptor, plain (not hybrid).
            append_indptr_cpu: int32 or int64 [batch + 1] on the CPU: where each sequence's rows of `keys` begin; ends
                at n. A sequence may append nothing.
            layer: the layer to write.

        Raises:
            TensorError: a wrong dtype, shape or device.
            LengthError: an indptr that does not fit, more new tokens than a sequence has, or a wrong layer.
            SharedPageError: a page to be written has more than one reference.
            PageError: a page to be written is free, out of range, or listed by two sequences that would write it.

        Nothing is written if any of these is raised. Cost: O(batch + n) on the CPU, one scatter each for keys and
        values.
        """
        caches = self.layer_tensors(layer)
        indptr = self._check_append(keys, values, flashinfer_data, append_indptr_cpu)
        tail = _tail_slots(flashinfer_data, indptr, self.page_size)
        self._check_writable(tail)
        self._write((keys, values), caches, tail)

    def copy_page_slots(self, src_pages: PageList, dst_pages: PageList, num_slots: PageList) -> None:
        """Copies the first `num_slots[i]` token slots of page `src_pages[i]` to `dst_pages[i]`, in every layer.

        One gather and one scatter each for keys and values, however many pages; byte for byte, whatever the dtype.

        Raises:
            PageError: a page out of range or free, or written where it is also read or written.
            SharedPageError: a destination that others hold too.
            LengthError: a number of slots that is not in [1, page_size], or lists of different lengths.
        """
        src, dst, slots = self.check_copy(src_pages, dst_pages, num_slots)
        if len(src) == 0:
            return
        offsets = self._on_device(np.arange(slots.sum()) - np.repeat(np.cumsum(slots) - slots, slots))
        src_index, dst_index = (self._on_device(np.repeat(pages, slots)) for pages in (src, dst))
        caches = [self._by_slot(cache) for cache in (self.key_cache, self.value_cache)]
        # Both are read before either is written: what runs out of memory does so while nothing has changed.
        copies = [cache[..., src_index, offsets, :, :] for cache in caches]
        for cache, copy in zip(caches, copies, strict=True):
            cache[..., dst_index, offsets, :, :] = copy

    def _check_append(
        self, keys: torch.Tensor, values: torch.Tensor, packed: FlashInferPackedData, append_indptr: torch.Tensor
    ) -> Int64Array:
        """The append indptr as int64, after the checks that need no look at the pages."""
        for name, tensor in (("keys", keys), ("values", values)):
            self._check_rows(name, tensor)
        if not isinstance(packed, FlashInferPackedData):
            raise TensorError(f"append_kv needs plain FlashInferPackedData, not {type(packed).__name__}")
        validate_last(packed.kv_page_indptr, packed.kv_last_page_len, self.page_size)
        indptr = _check_append_indptr(append_indptr, packed.num_sequences)
        if not len(keys) == len(values) == indptr[-1]:
            raise LengthError(
                f"{len(keys)} keys and {len(values)} values, but append_indptr_cpu ends at {indptr[-1]}: all must agree"
            )
        return indptr

    def _check_rows(self, name: str, tensor: torch.Tensor) -> None:
        # Callers without type checks pass lists and arrays.
        given: object = tensor
        if not isinstance(given, torch.Tensor):
            raise TensorError(f"{name} must be a tensor, not {type(given).__name__}")
        if tensor.is_nested or tensor.layout != torch.strided:
            seen = "nested" if tensor.is_nested else tensor.layout
            raise TensorError(f"{name} is a {seen} tensor: make it dense first")
        if tensor.ndim != 3 or tensor.shape[1:] != (self.num_heads, self.head_dim):
            raise TensorError(f"{name} has shape {list(tensor.shape)}, not [n, {self.num_heads}, {self.head_dim}]")
        if tensor.dtype != self.dtype:
            raise TensorError(f"{name} has dtype {tensor.dtype} but the cache holds {self.dtype}: convert it first")
        if tensor.device != self.device:
            raise TensorError(f"{name} is on {tensor.device} but the cache on {self.device}: move it there first")

    def _check_writable(self, tail: _Tail) -> None:
        """Refuses pages that are out of range, free, shared, or written for two sequences."""
        pages = self.as_pages(tail.written_pages)
        counts = self.ref_count[pages]
        if len(pages) and not (counts == 1).all():
            i = int((counts != 1).argmax())
            if counts[i] > 1:
                raise SharedPageError(int(pages[i]), int(counts[i]))
            raise PageError(f"page {pages[i]} is free and cannot be written: was its sequence released?")
        if len(np.unique(pages)) < len(pages):
            values, times = np.unique(pages, return_counts=True)
            raise PageError(f"page {values[times.argmax()]} would be written for {times.max()} sequences of the batch")

    def _write(
        self, rows: tuple[torch.Tensor, torch.Tensor], caches: tuple[torch.Tensor, torch.Tensor], tail: _Tail
    ) -> None:
        """Writes checked rows; what a kernel for one device would take over."""
        pages, offsets = self._on_device(tail.pages), self._on_device(tail.offsets)
        # The bytes of both are there before either is written. Lazy conjugates and negatives have none of their own.
        bits = [as_bits(new.detach().resolve_conj().resolve_neg()) for new in rows]
        for new, cache in zip(bits, caches, strict=True):
            self._by_slot(cache)[pages, offsets] = new

    def _by_slot(self, cache: torch.Tensor) -> torch.Tensor:
        """The bytes of a cache tensor with axes [..., page, slot, head, element], whatever its layout; a view."""
        bits = as_bits(cache)
        return bits if self.kv_layout == "NHD" else bits.transpose(-3, -2)

    def _on_device(self, indices: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(indices.astype(np.int64, copy=False)).to(self.device, non_blocking=True)


@define(slots=True, frozen=True, eq=False)
class _Tail:
    """Where new tokens go."""

    pages: PageArray  # [n], the page of each token
    offsets: Int64Array  # [n], its slot in that page
    written_pages: PageArray  # each written page, once for each sequence that writes it


def _tail_slots(packed: FlashInferPackedData, append_indptr: Int64Array, page_size: int) -> _Tail:
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
    table_index = np.arange(num_written.sum()) + np.repeat(first + first_written - (ends - num_written), num_written)
    return _Tail(pages, positions % page_size, indices[table_index])


def _check_append_indptr(append_indptr: torch.Tensor, num_sequences: int) -> Int64Array:
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


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of equal width: moving bytes works for every dtype, arithmetic does not."""
    return tensor.view(_BITS.get(tensor.element_size(), tensor.dtype))


def _storable(dtype: torch.dtype) -> torch.dtype:
    # Callers without type checks pass strings and numpy dtypes.
    given: object = dtype
    if not isinstance(given, torch.dtype):
        raise TensorError(f"dtype must be a torch.dtype, not {given!r}")
    try:
        torch.zeros(1, dtype=dtype)
    except (NotImplementedError, RuntimeError) as error:
        raise TensorError(f"memory of dtype {dtype} cannot be made: {error}") from error
    return dtype


def _device(device: torch.device | str | int) -> torch.device:
    try:
        return torch.empty(0, device=torch.device(device)).device
    # torch has a class of its own for every way in which a device can be absent
    except (RuntimeError, TypeError, ValueError, AssertionError, ImportError) as error:
        raise BadValueError(f"{device!r} is not a device, or none that this torch can use: {error}") from error
