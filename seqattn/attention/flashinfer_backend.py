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
- Query and cache dtypes, page sizes and layouts come from the manager. Positions are the caller's: no kernel is asked
  for position encodings or sliding windows, which levels would get wrong.
- fa3 is compiled with a barrier that flashinfer's own lacks (`seqattn.attention.fa3_sources`).
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from seqattn.append import side_by_side
from seqattn.attention.calls import KernelCall, Work, is_next, next_work, work_of
from seqattn.attention.choice import choose, own_of, what_matters
from seqattn.attention.fa3_sources import sound_costs
from seqattn.attention.prepared import Form, Prepared, Scratch, scratch_for
from seqattn.attention.streams import Streams
from seqattn.attention.views import Spans
from seqattn.attention.wrapper_set import WrapperSet
from seqattn.constants import Chip, constants_for
from seqattn.device import Heads
from seqattn.errors import MissingExtraError, SeqAttnError, TensorError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    import numpy.typing as npt

    from seqattn.attention.calls import Choice
    from seqattn.attention.plan import BatchPlan
    from seqattn.attention.wrapper import Wrapper
    from seqattn.cache import PagedKVCacheManager
    from seqattn.device import Groups
    from seqattn.kernels import Launcher

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
        self.manager, self.device = manager, manager.device
        self._index = self.device.index
        self.num_qo_heads = num_qo_heads
        self.heads_each = num_qo_heads // manager.num_heads
        self.sm_scale, self.logits_soft_cap = sm_scale, logits_soft_cap
        self.overlap = True
        properties = torch.cuda.get_device_properties(self.device)
        self.num_processors = properties.multi_processor_count
        self.heads = Heads(num_qo_heads, manager.num_heads, manager.head_dim, manager.dtype.itemsize)
        self.costs = sound_costs(constants_for(Chip.of(properties)))
        self.form = Form(num_qo_heads, manager.num_heads, manager.head_dim, manager.dtype, self.device)
        workspaces: dict[int, torch.Tensor] = {}
        self.sets = tuple(WrapperSet(manager, num_qo_heads, self.num_processors, workspaces) for _ in range(2))
        self._turn = 0
        self._scratch: Scratch | None = None
        #: what graphs captured by callers go on using, for each set: let go when that set is planned anew
        self._captured: tuple[set[Prepared], set[Prepared]] = (set(), set())
        #: a decoding batch, its calls and how long its own lists are; the next is often much the same
        self._known: tuple[BatchPlan, Work, tuple[int, int]] | None = None
        self._codes: tuple[object, list[torch.Tensor]] | None = None  # on the device, and the array that tells them
        self._last_slices: tuple[bytes, list[int]] = (b"none", [])
        self.spans = Spans(manager)
        self._launcher: Launcher | None = None
        self._streams = Streams(self.device)

    # -- planning ------------------------------------------------------------------------------------------------------

    def prepare(self, plan: BatchPlan, choices: Sequence[Choice] | None = None) -> Prepared:
        """Plans every level of a batch; what was prepared last stays valid until the call after this one.

        Args:
            plan: the batch.
            choices: how to compute each level; None for what is predicted to be fastest.
        """
        with self.on_device():
            if torch.cuda.is_current_stream_capturing():
                raise SeqAttnError("plan cannot be captured in a CUDA graph: plan first, then capture run")
            work = self.work(plan, choices)
            wrappers = self.sets[self._turn]
            self._captured[self._turn].clear()
            with wrappers.in_use():
                prepared = self._plan_calls(wrappers, work)
        self._turn = 1 - self._turn
        return prepared

    def work(self, plan: BatchPlan, choices: Sequence[Choice] | None = None) -> Work:
        """A batch as calls; the arguments are those of `prepare`."""
        if choices is not None:
            return self._work_of(plan, choices)
        own = own_of(plan, self.manager.page_size)
        if self._known is not None and self._known[2] == own and is_next(self._known[0], plan):
            return next_work(self._known[1], plan)
        how = {"has_fa3": self.costs.has_fa3, "has_spans": self.spans.exist}
        work = self._work_of(plan, choose(plan, self._slices_of, self.manager.page_size, **how))
        self._known = (plan, work, own) if plan.levels[-1].decodes else None
        return work

    def _work_of(self, plan: BatchPlan, choices: Sequence[Choice]) -> Work:
        return work_of(plan, choices, self.heads_each, self.manager.page_size, has_spans=self.spans.exist)

    def _slices_of(self, shared: Sequence[Groups], last: Groups) -> list[int]:
        """The slices of shared levels; those of a decoding batch stay the same for many steps."""
        key = what_matters(shared, last)
        if key != self._last_slices[0]:
            self._last_slices = key, self.costs.best(shared, self.heads, last)[1]
        return self._last_slices[1]

    def _plan_calls(self, wrappers: WrapperSet, work: Work) -> Prepared:
        """Sends the page numbers and codes to the device in one copy, and plans a wrapper for each call that is new."""
        used = []
        for i, call in enumerate(work.calls):
            lane = work.lane(i)
            nth = sum(work.lane(j) == lane and c.kind == call.kind for j, c in enumerate(work.calls[:i]))
            used.append(wrappers.sized(call, lane, nth))
        new = [i for i, call in enumerate(work.calls) if not used[i].is_planned_for(call)]
        codes: tuple[npt.NDArray[np.int32], ...] = ()
        known = self._codes if self._codes is not None and self._codes[0] is work.part_codes else None
        if not work.direct and known is None:
            codes = (work.query_codes, work.part_indptr, work.part_codes)
        arrays = [used[i].arrays(work.calls[i]) for i in new]
        staged = [*codes, *(array for to_send, _ in arrays for array in to_send)]
        lists = [i for i, array in enumerate(staged) if any(array is work.calls[k].kv_page_indices for k in new)]
        on_device, on_cpu = wrappers.stage(staged, [array for _, to_keep in arrays for array in to_keep], lists)
        sent, kept = iter(on_device[len(codes) :]), iter(on_cpu)
        for i, (to_send, to_keep) in zip(new, arrays, strict=True):
            call, tables = work.calls[i], ([next(sent) for _ in to_send], [next(kept) for _ in to_keep])
            used[i].plan(call, *tables, self.manager.page_size, partial(self.plan_call, used[i], call))
        if not work.direct and known is None:
            self._codes = known = (work.part_codes, on_device[:3])
        return self.prepared(work, used, known[1] if known is not None else ())

    def prepared(
        self, work: Work, used: Sequence[Wrapper], codes: Sequence[torch.Tensor], *, is_fixed: bool = False
    ) -> Prepared:
        """A step of planned wrappers, and the codes of its work on the device."""
        scratch = scratch_for(work, self.form, None if is_fixed else self._scratch)
        if not is_fixed:
            self._scratch = scratch
        runs = [wrapper.runs for wrapper in used if wrapper.runs is not None]
        return Prepared(work, runs, codes, scratch, is_fixed)

    def plan_call(
        self, wrapper: Wrapper, call: KernelCall, tables: tuple[torch.Tensor, ...], **options: object
    ) -> None:
        """Plans a wrapper for a call.

        Args:
            wrapper: of the call's kind.
            call: the call.
            tables: its qo_indptr, kv_page_indptr, pages and kv_last_page_len; the pages on the device, the others not.
            options: of the wrapper's plan.
        """
        manager = self.manager
        sizes = (manager.num_heads if call.by_group else self.num_qo_heads, manager.num_heads, manager.head_dim)
        common = {
            "q_data_type": manager.dtype,
            "kv_data_type": manager.dtype,
            "sm_scale": self.sm_scale,
            "logits_soft_cap": self.logits_soft_cap,
        } | options
        if call.span is not None:
            wrapper.made.plan(tables[0], manager.page_size * tables[1], *sizes, causal=call.causal, **common)
        elif call.kernel == "decode":
            if "seq_lens" not in common:  # flashinfer would take torch to it
                common["seq_lens"] = torch.from_numpy(call.lens(manager.page_size))
            wrapper.made.plan(*tables[1:], *sizes, manager.page_size, **common)
        else:
            wrapper.made.plan(*tables, *sizes, manager.page_size, causal=call.causal, **common)
        wrapper.done(call)

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
        caches = self.manager.layer_tensors(layer)
        if torch.cuda.is_current_stream_capturing() and not prepared.is_fixed:
            self._captured[1 - self._turn].add(prepared)  # the graph goes on using its memory
        q = side_by_side(q)
        direct = prepared.work.direct
        with self.on_device():
            out = torch.empty(q.shape, dtype=q.dtype, device=self.device)
            lse = out
            if return_lse or not direct:
                lse = torch.empty(q.shape[:2], dtype=torch.float32, device=self.device)
            if direct:
                prepared.runs[0][return_lse](q, caches, out, lse if return_lse else None)
            elif q.shape[0]:
                self._run_parts(q, layer, prepared, (out, lse))
        return out, lse

    def on_device(self) -> AbstractContextManager[None]:
        """Makes its device the current one; a guard takes longer than to see that there is no need of it."""
        return nullcontext() if torch.cuda.current_device() == self._index else torch.cuda.device(self._index)

    def _run_parts(
        self,
        q: torch.Tensor,
        layer: int,
        prepared: Prepared,
        results: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        if self._launcher is None:
            from seqattn.kernels import Launcher

            self._launcher = Launcher()
        scratch = prepared.scratch
        query_codes, part_indptr, part_codes = prepared.codes
        if scratch.has_gathered:
            self._launcher.gather_queries(q, query_codes, scratch.gathered, self.heads_each)
        num_calls = len(prepared.runs)
        if self.overlap and num_calls > 1:
            pause = prepared.work.calls[0].kernel == "fa3"
            self._streams.run(num_calls, lambda i: self._run_call(q, layer, prepared, i), pause=pause)
        else:
            for i in range(num_calls):
                self._run_call(q, layer, prepared, i)
        parts = (scratch.part_out, scratch.part_lse, part_indptr, part_codes)
        self._launcher.merge_parts(*parts, *results, heads_each=self.heads_each)

    def _run_call(self, q: torch.Tensor, layer: int, prepared: Prepared, i: int) -> None:
        queries, out, lse = prepared.scratch.views[i]
        if queries is None:
            num_rows = out.shape[0]
            queries = q if q.shape[0] == num_rows else q[:num_rows]
        span = prepared.work.calls[i].span
        caches = self.manager.layer_tensors(layer) if span is None else self.spans.of(layer, span)
        prepared.runs[i][1](queries, caches, out, lse)
