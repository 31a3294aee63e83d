"""What is kept of a planned step on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from attrs import define

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seqattn.attention.bound import BoundRun
    from seqattn.attention.calls import KernelCall, Work

__all__ = ["Form", "Prepared", "Scratch", "scratch_for"]


class Form(NamedTuple):
    """A model's heads and the dtype and device of its queries."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@define(slots=True, frozen=True, eq=False)
class Scratch:
    """Memory that every layer uses anew.

    Attributes:
        key: what it was made for.
        gathered: queries that calls read in another order, [queries, num_qo_heads, head_dim].
        part_out, part_lse: results of all calls, [parts, num_qo_heads, head_dim] and [parts, num_qo_heads].
        views: for each call its queries (None for the caller's), its output and its lse, in its own layout.
        has_gathered: whether there are any gathered queries.
    """

    key: tuple[object, ...]
    gathered: torch.Tensor
    part_out: torch.Tensor
    part_lse: torch.Tensor
    views: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]
    has_gathered: bool


@define(slots=True, frozen=True, eq=False)
class Prepared:
    """A planned step: its calls, and what they need on the device.

    Attributes:
        work: the calls.
        runs: for each call how it is run, without and with the log-sum-exp.
        codes: query_codes, part_indptr and part_codes of the work, int32 on the device; none where `work.direct`.
        scratch: memory that every layer uses anew.
        is_fixed: the memory of codes and plans stays in use after the step.
    """

    work: Work
    runs: Sequence[tuple[BoundRun, ...]]
    codes: Sequence[torch.Tensor]
    scratch: Scratch
    is_fixed: bool = False

    @property
    def wrappers(self) -> list[Any]:
        """The wrapper of each call."""
        return [runs[0].wrapper for runs in self.runs]


def scratch_for(work: Work, form: Form, last: Scratch | None) -> Scratch:
    """The memory of a step: that of an earlier one if it is laid out in the same way."""
    calls = () if work.direct else work.calls
    key = (form, len(work.query_codes), *((c.by_group, c.first_query, c.first_part, c.num_rows) for c in calls))
    if last is not None and last.key == key:
        return last
    num_parts = sum(call.num_rows for call in calls)
    row = (form.num_qo_heads, form.head_dim)
    gathered = torch.empty(len(work.query_codes), *row, dtype=form.dtype, device=form.device)
    part_out = torch.empty(num_parts, *row, dtype=form.dtype, device=form.device)
    part_lse = torch.empty(num_parts, form.num_qo_heads, dtype=torch.float32, device=form.device)
    views = []
    for call in calls:
        rows = slice(call.first_part, call.first_part + call.num_rows)
        queries = None
        if call.first_query is not None:
            queries = _laid_out(gathered[call.first_query : call.first_query + call.num_rows], call, form)
        out, lse = (_laid_out(tensor[rows], call, form) for tensor in (part_out, part_lse))
        views.append((queries, out, lse))
    return Scratch(key, gathered, part_out, part_lse, views, bool(len(work.query_codes)))


def _laid_out(tensor: torch.Tensor, call: KernelCall, form: Form) -> torch.Tensor:
    """Rows of queries or results as the call's kernel sees them."""
    if not call.by_group or form.num_qo_heads == form.num_kv_heads:
        return tensor
    return tensor.view(-1, form.num_kv_heads, *tensor.shape[2:])
