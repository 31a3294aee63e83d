"""A decode step as a CUDA graph: memory that stays in place, and what is written to it before each replay.

    new step ──▶ pinned memory ──▶ device: pages, offsets, codes, schedules, inputs ──▶ replay ──▶ outputs
                 written when the copies of the step before are done

A replay launches what was captured, on the same memory. flashinfer's wrappers have a mode for this: their plans keep
the number of blocks and every place in memory, and say in memory which blocks have work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import finalize

import numpy as np
import torch

from seqattn.attention.bound import BoundPlan
from seqattn.attention.capturing import capturing
from seqattn.attention.fixed import next_padded
from seqattn.attention.places import laid_out
from seqattn.attention.wrapper_set import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from seqattn.attention.calls import KernelCall, Work
    from seqattn.attention.fixed import StepForm
    from seqattn.attention.flashinfer_backend import FlashInferBackend
    from seqattn.attention.prepared import Prepared
    from seqattn.attention.wrapper import Wrapper

__all__ = ["CapturedStep"]

#: the pages last: of them only those are sent that there are
_PAGES = "kv_page_indices"
_NAMES = ("qo_indptr", "kv_page_indptr", "kv_last_page_len", _PAGES)
#: arguments of the plan of flashinfer's fa2 over pages, and where it is told its query rows, its sequences, that it is
#: for a graph, that it is to split nothing, and how many rows each sequence has, 0 for any (`uniform_q_len`)
_NUM_ARGUMENTS, _ROWS, _SEQUENCES, _IN_GRAPH, _WHOLE, _ROWS_EACH = 20, 6, 7, 11, 17, 19


class _Block:
    """Named int32 arrays in pinned memory and on the device, at places of `laid_out`."""

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        *begins, self._end = laid_out(list(sizes.values()), [i for i, name in enumerate(sizes) if name == _PAGES])
        self._host = torch.zeros(self._end, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(self._end, dtype=torch.int32, device=device)
        where = {name: slice(b, b + sizes[name]) for name, b in zip(sizes, begins, strict=True)}
        self.host = {name: self._host[part] for name, part in where.items()}
        self.device = {name: self._device[part] for name, part in where.items()}
        self._memory = {name: tensor.numpy() for name, tensor in self.host.items()}
        self.sizes = sizes

    def write(self, name: str, values: npt.NDArray[np.int32]) -> None:
        """Writes the beginning of an array in pinned memory."""
        self._memory[name][: len(values)] = values

    def written(self, name: str, count: int) -> torch.Tensor:
        """The beginning of an array in pinned memory."""
        return self.host[name] if count == self.sizes[name] else self.host[name][:count]

    def send(self, num_left: int = 0) -> None:
        """Copies the arrays to the device, but for so many numbers at the end of the last one."""
        end = self._end - num_left
        self._device[:end].copy_(self._host[:end], non_blocking=True)


class CapturedStep:
    """A graph of one form; makes and plans all that it needs.

    Args:
        backend: computes the attention.
        form: of the steps to come.
        inputs: like those of every step, but for their number of rows.
    """

    def __init__(self, backend: FlashInferBackend, form: StepForm, inputs: Sequence[torch.Tensor]) -> None:
        self.form = form
        self._backend = backend
        device = backend.device
        self._inputs = [torch.zeros(form.num_rows, *x.shape[1:], dtype=x.dtype, device=device) for x in inputs]
        sizes = {"places": 2 * form.num_rows, "part_indptr": form.num_rows + 1}
        sizes["query_codes"] = sum(call.num_rows for call in form.calls if call.gathered)
        sizes["part_codes"] = sum(call.num_rows for call in form.calls)
        self._codes = _Block(sizes, device)
        self._blocks: list[_Block] = []
        self._wrappers: list[Wrapper] = []
        self._plans: list[BoundPlan | None] = []
        self._last: tuple[Work, Work] | None = None  # the step before, and what it was padded to
        self._codes_of: object = None  # the array of the codes that are on the device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Any = None
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        finalize(self, wait_for, self._copied)  # as in `WrapperSet.in_use`
        self._prepared: Prepared | None = None

    def capture(
        self,
        model: Callable[[CapturedStep, list[torch.Tensor]], Any],
        on: tuple[Any, torch.cuda.Stream],
        work: Work,
        places: npt.NDArray[np.int32],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        """Runs the model on a step once to warm it up, and once more to record its launches; replays nothing.

        Args:
            model: called with this and the inputs in fixed memory.
            on: memory that graphs share, and the stream that records; torch's own for this belongs to the device that
                captured first, and would record nothing of another.
            work: the step's calls.
            places: int32 [2, rows], as in `Launcher.append_rows`.
            inputs: of the step.
        """
        self._write(work, places, inputs)
        pool, stream = on
        main = torch.cuda.current_stream(self._backend.device)
        stream.wait_stream(main)
        with torch.no_grad(), torch.cuda.device(self._backend.device):
            try:
                with torch.cuda.stream(stream):
                    model(self, self._inputs)
            finally:  # memory that is given back is not used anew before that
                main.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile is theirs. A capture that fails at its end would leave its stream current.
            recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
            with capturing(), torch.cuda.stream(main), recording:
                self._outputs = model(self, self._inputs)
        self._graph = graph

    def replay(self, work: Work, places: npt.NDArray[np.int32], inputs: Sequence[torch.Tensor]) -> Any:  # noqa: ANN401  the model's
        """Computes a step of the form; returns the model's outputs, padding included."""
        assert self._graph is not None
        self._write(work, places, inputs)
        self._graph.replay()
        return self._outputs

    def attend(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """Attention of the step in one layer, [form.num_rows, num_qo_heads, head_dim]; to be captured."""
        assert self._prepared is not None
        return self._backend.run(q, layer, self._prepared, return_lse=False)[0]

    @property
    def places(self) -> torch.Tensor:
        """Where new tokens go, int32 [2, form.num_rows] on the device; page -1 for padding."""
        return self._codes.device["places"].view(2, -1)

    def _write(self, work: Work, places: npt.NDArray[np.int32], inputs: Sequence[torch.Tensor]) -> None:
        """Brings a step into the fixed memory; waits until the copies of the step before are done."""
        filled = next_padded(self._last, work, self.form, self._backend.heads_each)
        self._last, work = (work, filled), filled
        with self._backend.on_device():
            self._copied.synchronize()
            try:
                self._write_tables(work, places)
            finally:
                self._copied.record(torch.cuda.current_stream(self._backend.device.index))
            for fixed, given in zip(self._inputs, inputs, strict=True):
                fixed[: len(given)].copy_(given.detach(), non_blocking=True)

    def _write_tables(self, work: Work, places: npt.NDArray[np.int32]) -> None:
        filled = np.full((2, self.form.num_rows), -1, dtype=np.int32)
        filled[:, : places.shape[1]] = places
        self._codes.write("places", filled.ravel())
        if not self.form.direct and work.part_codes is not self._codes_of:
            self._codes_of = None  # until all are written
            for name in ("query_codes", "part_indptr", "part_codes"):
                self._codes.write(name, getattr(work, name))
        self._codes.send()
        self._codes_of = work.part_codes
        if not self._wrappers:
            self._make(work)
        for i, call in enumerate(work.calls):
            if not self.form.calls[i].tables and not self._wrappers[i].is_planned_for(call):
                self._plan(call, i)
        if self._prepared is None:
            codes = [self._codes.device[name] for name in ("query_codes", "part_indptr", "part_codes")]
            self._prepared = self._backend.prepared(work, self._wrappers, codes, is_fixed=True)

    def _make(self, work: Work) -> None:
        """A wrapper for each call; those of calls that never change are planned here."""
        wrappers = self._backend.sets[0]
        for i, (call, form) in enumerate(zip(work.calls, self.form.calls, strict=True)):
            sizes = (form.num_groups + 1, form.num_groups + 1, form.num_groups, form.num_pages)
            block = _Block(dict(zip(_NAMES, sizes, strict=True)), self._backend.device)
            self._blocks.append(block)
            lane = work.lane(i)
            if form.tables:
                self._wrappers.append(wrappers.single(call, lane))
                self._plans.append(None)
                self._plan(call, i)
            else:
                self._wrappers.append(wrappers.fixed(call, lane, block.device))
                made = self._wrappers[-1].made
                self._plans.append(BoundPlan(made, _one_row_each) if call.kernel == "decode" else None)

    def _plan(self, call: KernelCall, i: int) -> None:
        """Sends a call's arrays, and plans its wrapper."""
        wrapper, block, bound = self._wrappers[i], self._blocks[i], self._plans[i]
        wrapper.forget()  # first: an interrupt leaves nothing planned whose tables are others
        for name in _NAMES:
            block.write(name, getattr(call, name))
        num_pages = len(call.kv_page_indices)
        block.send(block.sizes[_PAGES] - num_pages)
        indptr = block.written("kv_page_indptr", len(call.kv_page_indptr))

        def tables() -> tuple[torch.Tensor, ...]:
            qo_indptr = block.written("qo_indptr", len(call.qo_indptr))
            last = block.written("kv_last_page_len", len(call.kv_last_page_len))
            return qo_indptr, indptr, block.device[_PAGES][:num_pages], last

        if bound is None:
            self._backend.plan_call(wrapper, call, tables())
            return
        lengths = torch.from_numpy(call.lens(self._backend.manager.page_size))

        def plan() -> None:
            options = self._backend.sets[0].options(call) | {"seq_lens": lengths}
            wrapper.begin()
            self._backend.plan_call(wrapper, call, tables(), **options)

        if self._prepared is None:  # the wrapper loads its kernels with its first plan
            plan()
        bound(plan, indptr, lengths)  # also then: a capture keeps the grid of the last plan before it
        wrapper.keep(call)  # not done by a plan that is repeated


def _one_row_each(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a plan that decodes in a graph, with one row promised for each sequence, as each of them has.

    Without that the graph gets as many blocks as any rows could need: with four query heads for each KV head a quarter
    more than there are sequences. Where lists are not split, flashinfer 0.6 has those left over compute the first
    sequence once more. Arguments that are not those known are left as they are.
    """
    if len(arguments) != _NUM_ARGUMENTS or type(arguments[_WHOLE]) is not bool or arguments[_IN_GRAPH] is not True:
        return arguments
    rows_each = arguments[_ROWS_EACH]
    if arguments[_ROWS] != arguments[_SEQUENCES] or type(rows_each) is not int or rows_each:
        return arguments
    return (*arguments[:_ROWS_EACH], 1)
