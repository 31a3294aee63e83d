"""What `flashinfer.page` does, in a few loops over CPU tensors: enough to import and run seqattn 0.0.2.

The real kernels take the appended tokens as the tail of each sequence: `seq_lens` are total lengths, new tokens
included. They check no bounds; here a position before the first token fails.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

__all__ = ["install"]


def get_batch_indices_positions(
    append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each appended row its sequence and its position in that sequence, int32 [nnz]."""
    batch_indices = torch.full((nnz,), -1, dtype=torch.int32)
    positions = torch.zeros(nnz, dtype=torch.int32)
    indptr = append_indptr.tolist()
    for sequence, seq_len in enumerate(seq_lens.tolist()):
        for row in range(indptr[sequence], indptr[sequence + 1]):
            batch_indices[row] = sequence
            positions[row] = row + seq_len - indptr[sequence + 1]
    return batch_indices, positions


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Writes row i to position `positions[i]` of sequence `batch_indices[i]`; `kv_last_page_len` is not read."""
    page_size = paged_kv_cache[0].shape[1 if kv_layout == "NHD" else 2]
    for row, (sequence, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        assert position >= 0, f"row {row} would be written before the first token of sequence {sequence}"
        page = int(kv_indices[int(kv_indptr[sequence]) + position // page_size])
        for cache, new in zip(paged_kv_cache, (append_key, append_value), strict=True):
            target = cache[page] if kv_layout == "NHD" else cache[page].transpose(0, 1)
            target[position % page_size] = new[row]


def install() -> None:
    """Makes `import flashinfer` find this."""
    package, page = ModuleType("flashinfer"), ModuleType("flashinfer.page")
    page.__dict__.update(
        get_batch_indices_positions=get_batch_indices_positions, append_paged_kv_cache=append_paged_kv_cache
    )
    package.__dict__["page"] = page
    sys.modules["flashinfer"], sys.modules["flashinfer.page"] = package, page
