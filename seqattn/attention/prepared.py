"""What is kept of a planned step on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import define

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seqattn.attention.calls import KernelCall, Work

__all__ = ["Prepared"]


@define(slots=True, frozen=True, eq=False)
class Prepared:
    """A planned step: its calls, what they need on the device, and memory that every layer uses anew.

    Attributes:
        work: the calls.
        wrappers: one for each call.
        query_codes, part_indptr, part_codes: int32 on the device, as in `Work`.
        gathered: queries that calls read in another order, [queries, num_qo_heads, head_dim].
        part_out, part_lse: results of all calls, [parts, num_qo_heads, head_dim] and [parts, num_qo_heads].
        views: for each call its queries (None for the caller's), its output and its lse, in its own layout.
    """

    work: Work
    wrappers: list[Any]
    query_codes: torch.Tensor
    part_indptr: torch.Tensor
    part_codes: torch.Tensor
    gathered: torch.Tensor
    part_out: torch.Tensor
    part_lse: torch.Tensor
    views: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]

    @classmethod
    def of(
        cls,
        work: Work,
        wrappers: list[Any],
        codes: Sequence[torch.Tensor],
        form: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> Prepared:
        """A step with its memory.

        Args:
            work: the calls.
            wrappers: one for each call, planned.
            codes: query_codes, part_indptr and part_codes.
            form: query heads, KV heads, head_dim.
            dtype: of queries and results.
        """
        num_qo_heads, num_kv_heads, head_dim = form
        query_codes, part_indptr, part_codes = codes
        num_parts = 0 if work.direct else work.num_parts
        device = query_codes.device
        gathered = torch.empty(len(query_codes), num_qo_heads, head_dim, dtype=dtype, device=device)
        part_out = torch.empty(num_parts, num_qo_heads, head_dim, dtype=dtype, device=device)
        part_lse = torch.empty(num_parts, num_qo_heads, dtype=torch.float32, device=device)
        views = []
        for call in () if work.direct else work.calls:
            rows = slice(call.first_part, call.first_part + call.num_rows)
            queries = None
            if call.first_query is not None:
                queries = _laid_out(gathered[call.first_query : call.first_query + call.num_rows], call, num_kv_heads)
            out, lse = (_laid_out(tensor[rows], call, num_kv_heads) for tensor in (part_out, part_lse))
            views.append((queries, out, lse))
        return cls(work, wrappers, query_codes, part_indptr, part_codes, gathered, part_out, part_lse, views)


def _laid_out(tensor: torch.Tensor, call: KernelCall, num_kv_heads: int) -> torch.Tensor:
    """Rows of queries or results as the call's kernel sees them."""
    if not call.by_group or tensor.shape[1] == num_kv_heads:
        return tensor
    return tensor.view(-1, num_kv_heads, *tensor.shape[2:])
