"""Writing new keys and values into pages with flashinfer's kernel.

The kernel finds a token's page as `indices[(indptr[sequence] * page_size + position) // page_size]` and checks nothing.
It is given one made-up sequence whose i-th page is the page of new token i, so that nothing but checked pages and
offsets reaches it:

    page_size 4     new tokens go to (page, slot)   (2, 3)   (5, 0)   (5, 1)
    indices         [2 5 5]                         page i is where token i goes
    positions       [3 4 9]                         i * page_size + slot
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import define

from seqattn.errors import TensorError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from seqattn.kernels import Launcher

    Int64Array = npt.NDArray[np.int64]

__all__ = [
    "AppendTables",
    "as_bits",
    "can_append",
    "check_rows",
    "sent",
    "side_by_side",
    "tables_for",
    "write_places",
    "write_rows",
]

#: what the kernel is compiled for
_HEAD_DIMS = (64, 128, 256, 512)
_DTYPES = (torch.float16, torch.bfloat16)
#: what the kernel calls a layout
_LAYOUTS = {"NHD": 0, "HND": 1}
#: a dtype of equal width that every torch operation on indices supports
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@define(slots=True, frozen=True, eq=False)
class AppendTables:
    """Where new tokens go, as the kernel reads it; int32 on the cache's device.

    Attributes:
        indices: [n], the page of each token.
        positions: [n], `i * page_size` plus the slot.
        sequences: [n], zeros.
        indptr: [2], 0 and n.
        last_page_len: [1], not read by the kernel.
    """

    indices: torch.Tensor
    positions: torch.Tensor
    sequences: torch.Tensor
    indptr: torch.Tensor
    last_page_len: torch.Tensor


def can_append(key_cache: torch.Tensor, head_dim: int, page_size: int) -> bool:
    """Whether the kernel writes such a cache: 16-bit floats on CUDA, a head_dim it has, flashinfer installed."""
    fits = key_cache.device.type == "cuda" and key_cache.dtype in _DTYPES and head_dim in _HEAD_DIMS
    return fits and page_size > 0 and find_spec("flashinfer") is not None


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of equal width: moving bytes works for every dtype, arithmetic does not."""
    return tensor.view(_BITS.get(tensor.element_size(), tensor.dtype))


def check_rows(name: str, tensor: torch.Tensor, cache: torch.Tensor, num_heads: int) -> None:
    """Refuses new keys or values that are not [n, num_heads, head_dim], like the cache. Raises TensorError."""
    # Callers without type checks pass lists and arrays.
    given: object = tensor
    if not isinstance(given, torch.Tensor):
        raise TensorError(f"{name} must be a tensor, not {type(given).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        seen = "nested" if tensor.is_nested else tensor.layout
        raise TensorError(f"{name} is a {seen} tensor: make it dense first")
    if tensor.ndim != 3 or tensor.shape[1:] != (num_heads, cache.shape[-1]):
        raise TensorError(f"{name} has shape {list(tensor.shape)}, not [n, {num_heads}, {cache.shape[-1]}]")
    if tensor.dtype != cache.dtype:
        raise TensorError(f"{name} has dtype {tensor.dtype} but the cache holds {cache.dtype}: convert it first")
    if tensor.device != cache.device:
        raise TensorError(f"{name} is on {tensor.device} but the cache on {cache.device}: move it there first")


def tables_for(pages: npt.NDArray[np.int32], offsets: Int64Array, page_size: int, device: torch.device) -> AppendTables:
    """The tables of new tokens that go to these pages and slots: one copy to the device."""
    n = len(pages)
    host = np.zeros(3 * n + 3, dtype=np.int32)
    host[:n], host[n : 2 * n] = pages, np.arange(n) * page_size + offsets
    host[3 * n + 1 :] = n, page_size
    table = sent(host, device)
    return AppendTables(table[:n], table[n : 2 * n], table[2 * n : 3 * n], table[3 * n : -1], table[-1:])


def sent(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array on a device, which on CUDA nothing waits for; elsewhere it may be the same memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # torch keeps the memory until it is read
    return tensor.to(device, non_blocking=True)


def write_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: AppendTables,
    caches: tuple[torch.Tensor, torch.Tensor],
    kv_layout: str,
) -> None:
    """Writes row i of `keys` and `values` ([n, heads, head_dim], the caches' dtype) where the tables say."""
    if not len(keys):
        return
    rows = (side_by_side(keys), side_by_side(values), tables.sequences, tables.positions)
    pages = (tables.indices, tables.indptr, tables.last_page_len)
    kernel = _kernel()
    # A guard of the device takes longer than to see that there is no need of one.
    with nullcontext() if torch.cuda.current_device() == keys.device.index else torch.cuda.device(keys.device):
        if kernel is not None:
            kernel(*rows, *caches, *pages, _LAYOUTS[kv_layout])
        else:
            from flashinfer.page import append_paged_kv_cache

            append_paged_kv_cache(*rows, caches, *pages, kv_layout=kv_layout)


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., object] | None:
    """The compiled function behind flashinfer's `append_paged_kv_cache`, without torch's operator in between.

    None where this version has it elsewhere.
    """
    from flashinfer import page

    load = getattr(page, "get_page_module", None)
    return None if load is None else getattr(load(), "append_paged_kv_cache", None)


def write_places(
    rows: tuple[torch.Tensor, torch.Tensor],
    places: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    kv_layout: str,
    launcher: Launcher | None,
) -> None:
    """Writes keys and values to places that are known to be writable; on CUDA this may be captured in a graph.

    Args:
        rows: keys and values, [n, heads, head_dim] of the caches' dtype.
        places: int32 [2, n] on the caches' device: page and slot of each row; nothing is written for a page below 0.
        caches: keys and values of one layer, in the manager's layout.
        kv_layout: that layout.
        launcher: of the kernel that writes both; None to let torch do it.
    """
    new = [as_bits(tensor.detach().resolve_conj().resolve_neg()) for tensor in rows]
    by_slot = [as_bits(cache if kv_layout == "NHD" else cache.transpose(1, 2)) for cache in caches]
    if launcher is not None:
        new = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in new]
        with torch.cuda.device(places.device):
            launcher.append_rows((new[0], new[1]), (by_slot[0], by_slot[1]), places)
        return
    real = places[0] >= 0
    pages, slots = places[:, real].long()
    for tensor, cache in zip(new, by_slot, strict=True):
        cache[pages, slots] = tensor[real]


def side_by_side(rows: torch.Tensor) -> torch.Tensor:
    """The rows with each head's elements side by side and 16-byte aligned, as kernels load them; else a copy."""
    if rows.requires_grad or rows.is_neg():
        rows = rows.detach().resolve_neg()
    row, head, element = rows.stride()
    size = rows.element_size()
    aligned = not (rows.data_ptr() % 16 or row * size % 16 or head * size % 16)
    # `contiguous` would hand back rows that lie one after the other, but begin at an odd place.
    return rows if element == 1 and aligned else rows.clone(memory_format=torch.contiguous_format)
