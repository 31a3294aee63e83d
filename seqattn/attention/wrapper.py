"""One of flashinfer's wrappers, and the plans that it need not make anew.

call is the one that it is planned for     nothing to do
batch of the size that it decoded last     its kernel's own plan, with new arrays (`seqattn.attention.bound`)
any other                                  its `plan`
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import define

from seqattn.attention.bound import BoundPlan, BoundRun

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from seqattn.attention.calls import KernelCall

    Int32Array = npt.NDArray[np.int32]

__all__ = ["Replans", "Wrapper"]

#: what a plan leaves for its runs: offsets, pages and tokens of the last pages on the device, and the schedule
_PLANNED = ("_paged_kv_indptr_buf", "_paged_kv_indices_buf", "_paged_kv_last_page_len_buf", "_plan_info")


class Replans:
    """Plans of a wrapper that decodes batches of one size, each with new arrays on the device.

    Args:
        wrapper: to be planned, with workspaces that it keeps.
        num_sequences: of every batch.
    """

    __slots__ = ("_plan", "num_sequences", "wrapper")

    def __init__(self, wrapper: Any, num_sequences: int) -> None:  # noqa: ANN401  flashinfer's, untyped
        self.wrapper = wrapper
        self.num_sequences = num_sequences
        self._plan = BoundPlan(wrapper)

    @property
    def is_repeated(self) -> bool:
        """Whether the next plan is made without the wrapper."""
        return self._plan.is_repeated

    def first(
        self, plan: Callable[[], object], pages: torch.Tensor, indptr: torch.Tensor, lengths: torch.Tensor
    ) -> None:
        """Plans by the wrapper, and notes how if it keeps what it is told where it is expected to.

        Args:
            plan: makes the wrapper's plan.
            pages: what it gives it for the pages, int32 on the device.
            indptr: as in `BoundPlan`.
            lengths: likewise.
        """
        self._plan(plan, indptr, lengths)
        kept = self.wrapper.__dict__
        if kept.get(_PLANNED[1]) is not pages or any(kept.get(name) is None for name in _PLANNED):
            self._plan.forget()

    def again(
        self, tables: Sequence[torch.Tensor], indptr: torch.Tensor, lengths: torch.Tensor, runs: Sequence[BoundRun]
    ) -> tuple[BoundRun, ...]:
        """Plans without the wrapper; returns the runs of this plan.

        Args:
            tables: offsets, pages and tokens of the last pages, int32 on the device.
            indptr: as in `BoundPlan`.
            lengths: likewise.
            runs: of the plan before.
        """
        kept = self.wrapper.__dict__
        old = [kept[name] for name in _PLANNED]
        new = [*tables, self._plan(_never, indptr, lengths)]
        kept.update(zip(_PLANNED, new, strict=True))
        return tuple(run.after(old, new) for run in runs)


def _never() -> None:
    raise AssertionError("a plan that is repeated is not made by the wrapper")


@define(slots=True, eq=False)
class Wrapper:
    """One of flashinfer's wrappers.

    Attributes:
        made: the wrapper itself.
        float_size, int_size: bytes of its workspaces.
        planned: copies of the arrays that it is planned for; None if another plan is not worth comparing.
        call: that it is planned for.
        runs: how it is run, without and with the log-sum-exp.
        replans: if it decodes, its plans for batches of the size that it was last planned for.
    """

    made: Any
    float_size: int
    int_size: int
    planned: tuple[Int32Array, ...] | None = None
    call: KernelCall | None = None
    runs: tuple[BoundRun, ...] | None = None
    replans: Replans | None = None

    def is_planned_for(self, call: KernelCall) -> bool:
        """Whether its last plan was for the same groups, pages and lengths."""
        if self.planned is None or self.call is None or self.call.causal != call.causal:
            return False
        if self.call is call:
            return True
        is_same = all(np.array_equal(old, new) for old, new in zip(self.planned, _tables(call), strict=True))
        if is_same:
            self.call = call  # which the next steps have again
        return is_same

    def begin(self) -> None:
        """To be called before a plan: until `done`, nothing is planned."""
        self.forget()
        self.runs = None

    def forget(self) -> None:
        """From now on it is planned for no call that is known."""
        self.planned = self.call = None

    def arrays(self, call: KernelCall) -> tuple[tuple[Int32Array, ...], tuple[Int32Array, ...]]:
        """What a plan for a call reads on the device, and what it reads on the CPU."""
        known = self._known_replans(call)
        if known is not None and known.is_repeated:
            return (call.kv_page_indptr, call.kv_page_indices, call.kv_last_page_len), (call.kv_page_indptr,)
        return (call.kv_page_indices,), call.offsets

    def plan(
        self,
        call: KernelCall,
        on_device: Sequence[torch.Tensor],
        on_cpu: Sequence[torch.Tensor],
        page_size: int,
        by_wrapper: Callable[..., None],
    ) -> None:
        """Plans for a call; should it fail, nothing is planned.

        Args:
            call: the call.
            on_device: its `arrays` there, int32.
            on_cpu: likewise.
            page_size: token slots in a page.
            by_wrapper: makes the wrapper's plan of the tables and options of `FlashInferBackend.plan_call`.
        """
        replans, runs = self._known_replans(call), self.runs
        self.begin()
        self.replans = None
        if call.kernel == "decode":
            replans = replans or Replans(self.made, len(call.kv_last_page_len))
            lengths = torch.from_numpy(call.lens(page_size))
            if replans.is_repeated:
                assert runs is not None
                self.runs = replans.again(on_device, on_cpu[0], lengths, runs)
                self.keep(call)
            else:
                plan = partial(by_wrapper, (*on_cpu[:2], *on_device, on_cpu[2]), seq_lens=lengths)
                replans.first(plan, on_device[0], on_cpu[1], lengths)
            self.replans = replans
        else:
            by_wrapper((*on_cpu[:2], *on_device, on_cpu[2]))

    def _known_replans(self, call: KernelCall) -> Replans | None:
        """Its plans for batches of the size of a call that decodes, if the last one was of that size."""
        known = self.replans
        is_same = call.kernel == "decode" and known is not None and known.num_sequences == len(call.kv_last_page_len)
        return known if is_same else None

    def done(self, call: KernelCall) -> None:
        """To be called after a plan by the wrapper."""
        takes_two = call.span is not None
        self.runs = (BoundRun(self.made, takes_two=takes_two), BoundRun(self.made, takes_two=takes_two))
        self.keep(call)

    def keep(self, call: KernelCall) -> None:
        """Notes what it is planned for, unless the next step's lists are others anyway."""
        if not call.grows:
            self.planned, self.call = tuple(table.copy() for table in _tables(call)), call


def _tables(call: KernelCall) -> tuple[Int32Array, ...]:
    return call.kv_last_page_len, call.kv_page_indptr, call.qo_indptr, call.kv_page_indices
