"""The paged KV cache: page numbers and counts, with the key and value memory behind them.

    key_cache, NHD  [num_pages, page_size, num_heads, head_dim]      slot s of page p is key_cache[p, s]
    key_cache, HND  [num_pages, num_heads, page_size, head_dim]      slot s of page p is key_cache[p, :, s]

With more than one layer both have a leading layer axis. `append_kv` writes the tail of each sequence, which
`seqattn.tail` draws. On CUDA one kernel writes keys and values, and one copies page tails in all layers.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seqattn.append import AppendTables, as_bits, can_append, check_rows, sent, tables_for, write_rows
from seqattn.counts import as_count, positive
from seqattn.errors import BadValueError, LengthError, PageError, SharedPageError, TensorError
from seqattn.indptr import validate_last
from seqattn.packed import FlashInferPackedData
from seqattn.pages import PageAllocator
from seqattn.tail import Tail, append_indptr_of, refuse_twice, tail_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.kernels import Launcher
    from seqattn.pages import PageList

__all__ = ["PagedKVCacheManager", "as_bits"]


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
        #: the tail of the last append, and its tables on the device: one step writes it once for each layer
        self._tail: Tail | None = None
        self._tables: AppendTables | tuple[torch.Tensor, torch.Tensor] | None = None
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._views_of: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self._has_append = can_append(self.key_cache, self.head_dim, self.page_size)
        self._launcher: Launcher | None = None
        self._has_copy = self.device.type == "cuda" and find_spec("triton") is not None

    def get_memory_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`key_cache` and `value_cache` themselves, all layers."""
        return self.key_cache, self.value_cache

    def layer_tensors(self, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, 4 axes in the manager's own layout; the same views each time.

        Raises:
            LengthError: `layer` is not in [0, num_layers).
        """
        views, of = self._views, self._views_of
        if of[0] is not self.key_cache or of[1] is not self.value_cache:  # the memory is another
            views = self._views = list(zip(*map(self._layers, (self.key_cache, self.value_cache)), strict=True))
            self._views_of = self.get_memory_tensors()
        if type(layer) is int and 0 <= layer < len(views):
            return views[layer]
        if as_count("layer", layer) >= self.num_layers:
            raise LengthError(f"layer {layer} is not in [0, {self.num_layers})")
        return views[int(layer)]

    def _layers(self, cache: torch.Tensor) -> list[torch.Tensor]:
        return [cache[i] for i in range(self.num_layers)] if self.num_layers > 1 else [cache]

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

        Nothing is written if any of these is raised. Cost: O(batch + n) on the CPU and a copy of the places to the
        device, once a step: layers after the first that are given the same packed data skip this. Then one scatter each
        for keys and values; on CUDA with flashinfer one kernel for both.
        """
        caches = self.layer_tensors(layer)
        tail = self._check_append(keys, values, flashinfer_data, append_indptr_cpu)
        self.check_writable(tail.written_pages, checked=tail is self._tail)
        if tail is not self._tail:
            refuse_twice(tail.written_pages)
            self._tables = None  # should what follows fail, the next call starts anew
            self._tail = tail
        self._write(keys, values, caches, tail)

    def copy_page_slots(self, src_pages: PageList, dst_pages: PageList, num_slots: PageList) -> None:
        """Copies the first `num_slots[i]` token slots of page `src_pages[i]` to `dst_pages[i]`, in every layer.

        One kernel on CUDA, elsewhere one gather and one scatter each for keys and values, however many pages; byte for
        byte, whatever the dtype.

        Raises:
            PageError: a page out of range or free, or written where it is also read or written.
            SharedPageError: a destination that others hold too.
            LengthError: a number of slots that is not in [1, page_size], or lists of different lengths.
        """
        src, dst, slots = self.check_copy(src_pages, dst_pages, num_slots)
        if len(src) == 0:
            return
        if self._has_copy:
            self._copy_on_device(np.stack((src, dst, slots)).astype(np.int32))
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
    ) -> Tail:
        """Where the rows go, after the checks that need no look at the pages' counts."""
        for name, tensor in (("keys", keys), ("values", values)):
            check_rows(name, tensor, self.key_cache, self.num_heads)
        if not isinstance(packed, FlashInferPackedData):
            raise TensorError(f"append_kv needs plain FlashInferPackedData, not {type(packed).__name__}")
        tail = self._tail
        if tail is None or not tail.is_of(packed, append_indptr):
            indptr = append_indptr_of(append_indptr, packed.num_sequences)
            validate_last(packed.kv_page_indptr, packed.kv_last_page_len, self.page_size)
            tail = tail_of(packed, indptr, self.page_size)
        if not len(keys) == len(values) == len(tail.pages):
            raise LengthError(
                f"{len(keys)} keys and {len(values)} values, but append_indptr_cpu ends at {len(tail.pages)}: "
                "all must agree"
            )
        return tail

    def check_writable(self, pages: npt.NDArray[np.int32], *, checked: bool = False) -> None:
        """Refuses pages that cannot be written; O(pages).

        Args:
            pages: page numbers.
            checked: they are known to be in range. Counts may change between two layers, and are looked at anyway.

        Raises:
            SharedPageError: a page has more than one reference.
            PageError: a page is free or out of range.
        """
        known = pages if checked else self.as_pages(pages)
        counts = self.ref_count[known]
        if len(known) and not (counts == 1).all():
            i = int((counts != 1).argmax())
            if counts[i] > 1:
                raise SharedPageError(int(known[i]), int(counts[i]))
            raise PageError(f"page {known[i]} is free and cannot be written: was its sequence released?")

    def _write(
        self, keys: torch.Tensor, values: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], tail: Tail
    ) -> None:
        """Writes checked rows; the places are sent to the device with the first layer of a step."""
        if self._has_append:
            if not isinstance(self._tables, AppendTables):
                self._tables = tables_for(tail.pages, tail.offsets, self.page_size, self.device)
            write_rows(keys, values, self._tables, caches, self.kv_layout)
            return
        if not isinstance(self._tables, tuple):
            self._tables = self._on_device(tail.pages), self._on_device(tail.offsets)
        # The bytes of both are there before either is written. Lazy conjugates and negatives have none of their own.
        bits = [as_bits(new.detach().resolve_conj().resolve_neg()) for new in (keys, values)]
        for new, cache in zip(bits, caches, strict=True):
            self._by_slot(cache)[self._tables] = new

    def _copy_on_device(self, table: npt.NDArray[np.int32]) -> None:
        from seqattn.kernels import Launcher

        self._launcher = self._launcher or Launcher()
        words = []
        for cache in (self.key_cache, self.value_cache):
            by_slot = self._by_slot(cache if self.num_layers > 1 else cache[None])
            wide = self.head_dim * self.dtype.itemsize % 8 == 0
            words.append(by_slot.view(torch.int64) if wide else by_slot)
        with torch.cuda.device(self.device):
            self._launcher.copy_slots(words[0], words[1], sent(table, self.device), int(table[2].max()))

    def _by_slot(self, cache: torch.Tensor) -> torch.Tensor:
        """The bytes of a cache tensor with axes [..., page, slot, head, element], whatever its layout; a view."""
        bits = as_bits(cache)
        return bits if self.kv_layout == "NHD" else bits.transpose(-3, -2)

    def _on_device(self, indices: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(indices.astype(np.int64, copy=False)).to(self.device, non_blocking=True)


def _storable(dtype: torch.dtype) -> torch.dtype:
    # Callers without type checks pass strings and numpy dtypes.
    given: object = dtype
    if not isinstance(given, torch.dtype):
        raise TensorError(f"dtype must be a torch.dtype, not {given!r}")
    try:
        torch.zeros(1, dtype=dtype)
    # torch cannot be asked whether a dtype has memory of its own (quantised ones have none): making some tells.
    except RuntimeError as error:
        raise TensorError(f"memory of dtype {dtype} cannot be made: {error}") from error
    return dtype


def _device(device: torch.device | str | int) -> torch.device:
    try:
        return torch.empty(0, device=torch.device(device)).device
    # torch has a class of its own for every way in which a device can be absent
    except (RuntimeError, TypeError, ValueError, AssertionError, ImportError) as error:
        raise BadValueError(f"{device!r} is not a device, or none that this torch can use: {error}") from error
