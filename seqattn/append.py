"""Writing new keys and values into pages with flashinfer's kernel.

The kernel finds a token's page as `indices[(indptr[sequence] * page_size + position) // page_size]` and checks nothing.
It is given one made-up sequence whose i-th page is the page of new token i, so that nothing but checked pages and
offsets reaches it:

    page_size 4     new tokens go to (page, slot)   (2, 3)   (5, 0)   (5, 1)
    indices         [2 5 5]                         page i is where token i goes
    positions       [3 4 9]                         i * page_size + slot
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import define

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64Array = npt.NDArray[np.int64]

__all__ = ["AppendTables", "can_append", "tables_for", "write_rows"]

#: what the kernel is compiled for
_HEAD_DIMS = (64, 128, 256, 512)
_DTYPES = (torch.float16, torch.bfloat16)


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


def tables_for(pages: npt.NDArray[np.int32], offsets: Int64Array, page_size: int, device: torch.device) -> AppendTables:
    """The tables of new tokens that go to these pages and slots: one copy to the device."""
    n = len(pages)
    host = np.zeros(3 * n + 3, dtype=np.int32)
    host[:n], host[n : 2 * n] = pages, np.arange(n) * page_size + offsets
    host[3 * n + 1 :] = n, page_size
    sent = torch.from_numpy(host).to(device)
    return AppendTables(sent[:n], sent[n : 2 * n], sent[2 * n : 3 * n], sent[3 * n : -1], sent[-1:])


def write_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: AppendTables,
    caches: tuple[torch.Tensor, torch.Tensor],
    kv_layout: str,
) -> None:
    """Writes row i of `keys` and `values` ([n, heads, head_dim], the caches' dtype) where the tables say."""
    from flashinfer.page import append_paged_kv_cache

    if not len(keys):
        return
    with torch.cuda.device(keys.device):
        append_paged_kv_cache(
            _side_by_side(keys.detach().resolve_neg()),
            _side_by_side(values.detach().resolve_neg()),
            tables.sequences,
            tables.positions,
            caches,
            tables.indices,
            tables.indptr,
            tables.last_page_len,
            kv_layout=kv_layout,
        )


def _side_by_side(rows: torch.Tensor) -> torch.Tensor:
    """The rows with each head's elements side by side and 16-byte aligned, as the kernel loads them; else a copy."""
    aligned = rows.data_ptr() % 16 == 0 and all(stride * rows.element_size() % 16 == 0 for stride in rows.stride()[:2])
    return rows if rows.stride(-1) == 1 and aligned else rows.contiguous()
