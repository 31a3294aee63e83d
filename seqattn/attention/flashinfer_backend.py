"""Attention with flashinfer's kernels on CUDA.

A step is planned once and run in every layer. What a step does in one layer:

    gather queries ─┬─ top shared level (fa3 in slices, or fa2)  ── high priority ─┬─ merge
                    ├─ lower shared levels                       ── less ──────────┤
                    └─ the last level                            ── main stream ───┘

A tile of fa3 takes a whole multiprocessor, which never becomes free while the many small tiles of the last level keep
coming: the shared levels go first, and the last level has what they leave idle.

A plain batch in the caller's order is one kernel, without gathering and merging.

What flashinfer leaves to its callers is settled here:

- Offsets and lengths are int32 and come from the CPU, so that planning never waits for the device.
- A wrapper's plan is copied from pinned memory that the next plan would overwrite. Wrappers come in two sets, used in
  turn; a set is planned anew only after its copies are done. So a plan that fails leaves the one before as it was.
- Workspaces are sized for the plan before it is made; each stream has its own.
- Groups without pages or rows never reach a kernel, and no row is merged with a part that nothing computed.
- Query and cache dtypes, page sizes and layouts come from the manager. Positions are the caller's: keys are written
  with theirs, and no kernel is asked for position encodings or sliding windows, which levels would get wrong.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from seqattn.attention.calls import KernelCall, Work, work_of
from seqattn.attention.choice import choose
from seqattn.attention.prepared import Prepared
from seqattn.attention.wrappers import WrapperSet
from seqattn.constants import Chip, constants_for
from seqattn.device import Heads
from seqattn.errors import MissingExtraError, SeqAttnError, TensorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seqattn.attention.calls import Choice
    from seqattn.attention.plan import BatchPlan
    from seqattn.cache import PagedKVCacheManager
    from seqattn.device import Groups

__all__ = ["FlashInferBackend", "why_not"]

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128, 256)


def why_not(manager: PagedKVCacheManager) -> str | None:
    """Why these kernels cannot read a manager's cache; None if they can."""
    if manager.device.type != "cuda":
        return f"the cache is on {manager.device}, not on CUDA"
    if manager.dtype not in _DTYPES:
        return f"the cache holds {manager.dtype}, not float16 or bfloat16"
    if manager.head_dim not in _HEAD_DIMS:
        return f"head_dim is {manager.head_dim}, not one of {_HEAD_DIMS}"
    return None


class FlashInferBackend:
    """Computes a planned batch over a manager's pages; the arguments are those of `TorchBackend`.

    Attributes:
        overlap: compute levels at the same time, on three streams.

    Raises:
        MissingExtraError: flashinfer is not installed.
        TensorError: a cache that its kernels do not read.
    """

    #: rows come in the caller's order
    orders_rows = True

    def __init__(
        self, manager: PagedKVCacheManager, num_qo_heads: int, sm_scale: float, logits_soft_cap: float | None
    ) -> None:
        if find_spec("flashinfer") is None:
            raise MissingExtraError("flashinfer", "flashinfer")
        reason = why_not(manager)
        if reason is not None:
            raise TensorError(f"backend 'flashinfer' cannot be used: {reason}; use backend='torch'")
        self.manager = manager
        self.device = manager.device
        self.num_qo_heads = num_qo_heads
        self.heads_each = num_qo_heads // manager.num_heads
        self.sm_scale = sm_scale
        self.logits_soft_cap = logits_soft_cap
        self.overlap = True
        properties = torch.cuda.get_device_properties(self.device)
        self.num_processors = properties.multi_processor_count
        self.heads = Heads(num_qo_heads, manager.num_heads, manager.head_dim, manager.dtype.itemsize)
        self.costs = constants_for(Chip.of(properties))
        workspaces: dict[int, torch.Tensor] = {}
        self._sets = tuple(WrapperSet(manager, num_qo_heads, self.num_processors, workspaces) for _ in range(2))
        self._turn = 0
        self._captured: list[Prepared] = []
        self._last_slices: tuple[bytes, list[int]] = (b"none", [])
        self._sides = [torch.cuda.Stream(self.device, priority=priority) for priority in (-2, -1)]  # type: ignore[no-untyped-call]
        self._pause = torch.zeros(1, device=self.device)
        self._events = tuple(torch.cuda.Event() for _ in range(4))  # type: ignore[no-untyped-call]

    # -- planning ------------------------------------------------------------------------------------------------------

    def prepare(self, plan: BatchPlan, choices: Sequence[Choice] | None = None) -> Prepared:
        """Plans every level of a batch; what was prepared last stays valid until the call after this one.

        Args:
            plan: the batch.
            choices: how to compute each level; None for what is predicted to be fastest.
        """
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                raise SeqAttnError("plan cannot be captured in a CUDA graph: plan first, then capture run")
            work = work_of(plan, choices or self._choices(plan), self.heads_each, self.manager.page_size)
            wrappers = self._sets[self._turn]
            with wrappers.in_use():
                prepared = self._plan_calls(wrappers, work)
        self._turn = 1 - self._turn
        return prepared

    def _choices(self, plan: BatchPlan) -> list[Choice]:
        return choose(plan, self._slices_of, self.manager.page_size, has_fa3=self.costs.has_fa3)

    def _slices_of(self, shared: Sequence[Groups], last: Groups) -> list[int]:
        """The slices of shared levels; those of a decoding batch stay the same for many steps."""
        about = repr((len(last.rows), int(last.rows.sum()), int(last.tokens.sum()) // (32 * len(last.rows)))).encode()
        key = about + b"".join(array.tobytes() for level in shared for array in (level.rows, level.tokens))
        if key != self._last_slices[0]:
            self._last_slices = key, self.costs.best(shared, self.heads, last)[1]
        return self._last_slices[1]

    def _plan_calls(self, wrappers: WrapperSet, work: Work) -> Prepared:
        """Sends the page numbers and codes to the device in one copy, and plans a wrapper for each call."""
        pages = [call.kv_page_indices for call in work.calls]
        codes = (work.query_codes, work.part_indptr, work.part_codes)
        on_device, offsets = wrappers.stage(
            [*pages, *codes],
            [part for call in work.calls for part in (call.qo_indptr, call.kv_page_indptr, call.kv_last_page_len)],
        )
        planned = []
        for i, call in enumerate(work.calls):
            nth = sum(other.kernel == call.kernel for other in work.calls[:i])
            wrapper = wrappers.sized(call, _lane(i, work), nth)
            qo_indptr, kv_page_indptr, last = offsets[3 * i : 3 * i + 3]
            self._plan_call(wrapper, call, (qo_indptr, kv_page_indptr, on_device[i], last))
            planned.append(wrapper)
        form = (self.num_qo_heads, self.manager.num_heads, self.manager.head_dim)
        return Prepared.of(work, planned, on_device[len(pages) :], form, self.manager.dtype)

    def _plan_call(self, wrapper: Any, call: KernelCall, tables: tuple[torch.Tensor, ...]) -> None:  # noqa: ANN401  flashinfer's, untyped
        manager = self.manager
        sizes = (manager.num_heads if call.by_group else self.num_qo_heads, manager.num_heads, manager.head_dim)
        common = {
            "q_data_type": manager.dtype,
            "kv_data_type": manager.dtype,
            "sm_scale": self.sm_scale,
            "logits_soft_cap": self.logits_soft_cap,
        }
        if call.kernel == "decode":
            wrapper.plan(*tables[1:], *sizes, manager.page_size, **common)
        else:
            wrapper.plan(*tables, *sizes, manager.page_size, causal=call.causal, **common)

    # -- running -------------------------------------------------------------------------------------------------------

    def run(
        self, q: torch.Tensor, layer: int, prepared: Prepared, *, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and base-2 log-sum-exp of rows in the caller's order; lse is empty unless it is asked for.

        Args:
            q: [rows, num_qo_heads, head_dim], of the cache's dtype.
            layer: the layer of the cache to read.
            prepared: what `prepare` returned.
            return_lse: whether the log-sum-exp is wanted.

        Raises:
            TensorError: `q` is of another dtype.
        """
        if q.dtype != self.manager.dtype:
            raise TensorError(f"q is {q.dtype} but the cache holds {self.manager.dtype}: the kernels read one dtype")
        caches, work = self.manager.layer_tensors(layer), prepared.work
        if torch.cuda.is_current_stream_capturing() and prepared not in self._captured:
            self._captured.append(prepared)  # the graph goes on using its memory
        q = q if q.stride(-1) == 1 else q.contiguous()
        with torch.cuda.device(self.device):
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            lse = torch.empty(q.shape[:2] if return_lse or not work.direct else 0, dtype=torch.float32, device=q.device)
            if work.direct:
                self._run_direct(q, caches, prepared, (out, lse), return_lse=return_lse)
            elif len(q):
                self._run_parts(q, caches, prepared, (out, lse))
        return out, lse

    def _run_direct(
        self,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        prepared: Prepared,
        results: tuple[torch.Tensor, torch.Tensor],
        *,
        return_lse: bool,
    ) -> None:
        out, lse = results
        if return_lse:
            prepared.wrappers[0].run(q, caches, out=out, lse=lse, return_lse=True)
        else:
            prepared.wrappers[0].run(q, caches, out=out)

    def _run_parts(
        self,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        prepared: Prepared,
        results: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        from seqattn.kernels import gather_queries, merge_parts

        if len(prepared.gathered):
            gather_queries(q, prepared.query_codes, prepared.gathered, self.heads_each)
        if self.overlap and len(prepared.work.calls) > 1:
            self._run_on_streams(q, caches, prepared)
        else:
            for i in range(len(prepared.work.calls)):
                _run_call(q, caches, prepared, i)
        codes = (prepared.part_indptr, prepared.part_codes)
        merge_parts(prepared.part_out, prepared.part_lse, *codes, *results, heads_each=self.heads_each)

    def _run_on_streams(self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], prepared: Prepared) -> None:
        """The last call on the caller's stream, those before it on streams that go first."""
        main = torch.cuda.current_stream(self.device)
        calls, begun, done = prepared.work.calls, self._events[:2], self._events[2:]
        sides = list(zip(self._sides, ([0], range(1, len(calls) - 1)), begun, done, strict=True))[: len(calls) - 1]
        begun[0].record(main)
        if calls[0].kernel == "fa3":
            self._pause.zero_()  # meanwhile the blocks of the first call get their multiprocessors
        begun[1].record(main)
        try:
            for side, its, start, _ in sides:
                side.wait_event(start)
                torch.cuda.set_stream(side)
                for i in its:
                    _run_call(q, caches, prepared, i)
        finally:
            torch.cuda.set_stream(main)
        _run_call(q, caches, prepared, len(calls) - 1)
        for side, _, _, end in sides:
            end.record(side)
            main.wait_event(end)


def _run_call(q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], prepared: Prepared, i: int) -> None:
    queries, out, lse = prepared.views[i]
    prepared.wrappers[i].run(q if queries is None else queries, caches, out=out, lse=lse, return_lse=True)


def _lane(i: int, work: Work) -> int:
    """The stream of a call: 0 for the last on the caller's, 1 for the first of several, 2 for those between."""
    return 0 if i == len(work.calls) - 1 else min(i, 1) + 1
