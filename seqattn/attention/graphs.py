"""Decoding with CUDA graphs: a model's step is captured once for each batch size, and replayed for the steps to come.

    def model(step: DecodeStep, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = embed(tokens)
        for layer in range(num_layers):
            q, k, v = ...                                     # [step.num_rows, heads, head_dim]
            step.append_kv(k, v, layer=layer)
            hidden = ... step.run(q, layer=layer) ...
        return logits

    graphs = DecodeGraphs(attention, model, [1, 8, 64, 256], max_tokens=32768)
    while running:
        descriptor.allocate_decoding(ids)                     # one more token each
        data = descriptor.pack_hybrid_for_flashinfer(ids, cost_model=attention.graph_cost_model)
        logits = graphs.replay(data, tokens, positions)       # or plain data

Several new tokens of one sequence are as many sequences, each of the tokens up to its own: all keys and values of a
layer are written before its attention. So a short prompt after a long prefix is a decode step, too.

A batch is padded to the next batch size. What else a graph fixes, the kernels of hybrid levels and their sizes,
`seqattn.attention.fixed` says; a step for which there is no graph yet is computed without one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from operator import is_
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from seqattn.append import sent
from seqattn.attention.fixed import Sizes, form_of, key_of, nothing, page_by_page
from seqattn.attention.step import DecodeStep, check_input, first_rows, launcher_for, new_places
from seqattn.counts import positive
from seqattn.errors import BadValueError, LengthError
from seqattn.tail import refuse_same_slot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from seqattn.attention.calls import Work
    from seqattn.attention.captured import CapturedStep
    from seqattn.attention.fixed import StepForm
    from seqattn.attention.front import PagedAttention
    from seqattn.attention.plan import BatchPlan
    from seqattn.packed import FlashInferHybridData, FlashInferPackedData

    Int32Array = npt.NDArray[np.int32]

__all__ = ["DecodeGraphs"]

Out = TypeVar("Out")

_log = logging.getLogger("seqattn")
#: steps with the same prompt in one piece, after which it is worth a graph of its own that reads it as one array
_STEADY = 32


class DecodeGraphs(Generic[Out]):
    """CUDA graphs of a model's decode step; drawn at the top of this file.

    The model is called as `model(step, *inputs)`, with inputs padded to the batch size, and returns a tensor or a tuple
    of tensors with a row for each sequence. It is called twice for each graph that is captured, and must do the same
    each time: launches only, no wait for the device, no look at values. Where no graph fits, it is called as it is.
    Belongs to one thread and one stream, like its attention; no other thread may use CUDA during a capture.

    A capture that fails with a RuntimeError, out of memory say, is logged; that step and all later ones are computed
    without graphs, where a mistake of the model's own raises again. What else the model raises reaches the caller.

    Args:
        attention: its backend captures if it is "flashinfer"; with "torch" every step is computed without a graph.
        model: a decode step.
        batch_sizes: to which batches are padded; larger batches are computed without a graph.
        max_tokens: of a sequence. Each graph has memory for the page numbers of a batch of such sequences; a step that
            needs more is computed without a graph.
        capture_after: steps of the same form that are seen before it is captured. Capturing takes the time of some
            steps, so that a form that passes is not worth it.
        max_graphs: the least recently used ones beyond are dropped.

    Attributes:
        num_captures, num_replays, num_eager: graphs captured, steps replayed, steps computed without a graph.

    Raises:
        BadValueError: no batch size, or a number below 1.
    """

    def __init__(
        self,
        attention: PagedAttention,
        model: Callable[..., Out],
        batch_sizes: Sequence[int],
        *,
        max_tokens: int,
        capture_after: int = 2,
        max_graphs: int = 32,
    ) -> None:
        self.attention = attention
        self.model = model
        self.batch_sizes = sorted({positive("batch_sizes", size) for size in batch_sizes})
        if not self.batch_sizes:
            raise BadValueError("batch_sizes is empty: name at least one")
        self._capture_after = positive("capture_after", capture_after)
        self._max_graphs = positive("max_graphs", max_graphs)
        manager = attention.manager
        pages_each = -(-positive("max_tokens", max_tokens) // manager.page_size)
        self._sizes = Sizes(attention.num_qo_heads // manager.num_heads, manager.num_pages, pages_each)
        self._steps: OrderedDict[Any, CapturedStep] = OrderedDict()
        self._seen: OrderedDict[Any, int] = OrderedDict()
        self._memory = manager.get_memory_tensors()  # that graphs read and write, by its address
        #: None where every step is computed without a graph
        self._backend: Any = attention._impl if attention.backend == "flashinfer" else None
        self._launcher = launcher_for(manager)
        #: that of `PagedAttention.plan`, which finds the same levels again for a step without a graph
        self._planner = attention._planner
        self._paged: tuple[Work, Work] | None = None  # the last step whose prompt lay in one piece, and page by page
        self._on: tuple[Any, torch.cuda.Stream] | None = None  # memory that graphs share, and the stream that records
        self.num_captures = self.num_replays = self.num_eager = 0

    @property
    def captures(self) -> bool:
        """Whether it captures: its attention's backend is "flashinfer", and no capture has failed."""
        return self._backend is not None

    def capture(self, *inputs: torch.Tensor) -> None:
        """Captures the graph of plain batches for every batch size, largest first: at the start, not in a first step.

        Args:
            inputs: like those of `replay`, with any number of rows; their values are not used. The model sees zeros.
        """
        self._follow_memory()
        work, places = nothing(), np.zeros((2, 0), dtype=np.int32)
        for num_rows in reversed(self.batch_sizes):
            form = form_of(work, num_rows, self._sizes)
            if self.captures and form is not None and key_of(form, inputs) not in self._steps:
                self._captured(form, work, places, [x[:0] for x in inputs])

    def replay(self, data: FlashInferPackedData | FlashInferHybridData, *inputs: torch.Tensor) -> Out:
        """Computes a decode step: each sequence's last token is new, its page table and length include it.

        Args:
            data: the batch, plain or hybrid, packed for one query row each; on the CPU.
            inputs: of the model, on the cache's device, with a row for each sequence in the order in which the batch
                was packed.

        Returns:
            What the model returns, without padding. It lies in memory of the graph: valid until the next call.

        Raises:
            TensorError: `data` is of another type, or an input has not one row for each sequence or another device.
            LengthError: a sequence has other than one query row, or broken packed data.
            PageError: a page that is free or not the manager's, or a slot that two sequences would write.
            SharedPageError: the page of a new token has more than one reference.
            What the model raises, perhaps after it has written new tokens; nothing is written if another is raised.

        Cost on the CPU: that of `PagedAttention.plan`; waits for the copies of the step before, not for its kernels.
        """
        plan, places = self._checked(data, inputs)
        found = self._replayed(plan, places, inputs)
        if found is not None:
            return found
        self.num_eager += 1
        step_without = self._without_graph(data, places)
        with torch.no_grad():
            return self.model(step_without, *inputs)

    def replay_if_captured(
        self, data: FlashInferPackedData | FlashInferHybridData, *inputs: torch.Tensor
    ) -> Out | None:
        """`replay` if that takes a graph, captured now if it is due; else None: the step is still to be computed."""
        return self._replayed(*self._checked(data, inputs), inputs)

    def _replayed(self, plan: BatchPlan, places: Int32Array, inputs: Sequence[torch.Tensor]) -> Out | None:
        found = self._fitting(plan, places, inputs)
        if found is None:
            return None
        self.num_replays += 1
        step, work = found
        outputs: Out = first_rows(step.replay(work, places, inputs), plan.num_rows)
        return outputs

    def _checked(
        self, data: FlashInferPackedData | FlashInferHybridData, inputs: Sequence[torch.Tensor]
    ) -> tuple[BatchPlan, Int32Array]:
        """A step as levels, and where its new tokens go; raises what `replay` does."""
        plan = self._planner.plan(data, None, causal=True)
        if len(plan.levels[-1].kv_last_page_len) and not plan.levels[-1].decodes:
            raise LengthError("a decode step has one query row for each sequence: pack it with query_lens=None")
        for tensor in inputs:
            check_input(tensor, plan.num_rows, self.attention.manager.device)
        places = new_places(plan)
        self.attention.manager.check_writable(places[0])
        refuse_same_slot(places, self.attention.manager.page_size)
        return plan, places

    def _fitting(
        self, plan: BatchPlan, places: Int32Array, inputs: Sequence[torch.Tensor]
    ) -> tuple[CapturedStep, Work] | None:
        """The graph for a step, captured if its form was seen often enough; None if there is none."""
        num_rows = next((size for size in self.batch_sizes if size >= plan.num_rows), None)
        if self._backend is None or num_rows is None or not plan.num_rows:
            return None
        self._follow_memory()
        work = self._backend.work(plan)
        if any(call.span is not None for call in work.calls):
            # Such a graph holds the prompt's place in memory; one that reads page by page serves any prompt.
            found = self._graph_of(work, num_rows, (places, inputs), max(_STEADY, self._capture_after))
            if found is not None:
                return found
            paged = page_by_page(work, self._paged)
            self._paged, work = (work, paged), paged
        return self._graph_of(work, num_rows, (places, inputs), self._capture_after)

    def _follow_memory(self) -> None:
        """Forgets all graphs if the manager has other memory now."""
        memory = self.attention.manager.get_memory_tensors()
        if not all(map(is_, memory, self._memory)):
            self._steps.clear()
            self._seen.clear()
            self._memory = memory

    def _graph_of(
        self, work: Work, num_rows: int, given: tuple[Int32Array, Sequence[torch.Tensor]], capture_after: int
    ) -> tuple[CapturedStep, Work] | None:
        form = form_of(work, num_rows, self._sizes)
        if form is None or self._backend is None:  # none any more: another capture for this step has failed
            return None
        key = key_of(form, given[1])
        step = self._steps.get(key)
        if step is not None:
            self._steps.move_to_end(key)
            return step, work
        seen = self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > self._max_graphs:
            self._seen.popitem(last=False)
        if seen < max(capture_after, self._steps_before(form)):
            return None
        step = self._captured(form, work, *given)
        return None if step is None else (step, work)

    def _steps_before(self, form: StepForm) -> int:  # noqa: ARG002  subclasses look at it
        """Steps of a form that are seen before it is captured."""
        return self._capture_after

    def _captured(
        self, form: StepForm, work: Work, places: Int32Array, inputs: Sequence[torch.Tensor]
    ) -> CapturedStep | None:
        """A new graph of a form; None if that fails, after which there are no graphs."""
        try:
            if self._on is None:
                self._on = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._backend.device)  # type: ignore[no-untyped-call]
            with torch.inference_mode(mode=False):  # its memory is written by later steps, in whatever mode they are
                step = self._recorded(form, self._on, work, places, inputs)
        except RuntimeError as error:  # of CUDA; what is wrong with the step's data has been found by now
            self._backend = None
            self._steps.clear()  # no later step looks at them: their memory is free for what goes on without
            _log.warning("decoding goes on without CUDA graphs: a capture failed: %s", error)
            return None
        key = key_of(form, inputs)
        self._steps[key] = step
        self._seen.pop(key, None)
        self.num_captures += 1
        if len(self._steps) > self._max_graphs:
            self._steps.popitem(last=False)
        return step

    def _recorded(
        self,
        form: StepForm,
        on: tuple[Any, torch.cuda.Stream],
        work: Work,
        places: Int32Array,
        inputs: Sequence[torch.Tensor],
    ) -> CapturedStep:
        """A new graph of a form, that of the whole model; the arguments are those of `CapturedStep.capture`."""
        from seqattn.attention.captured import CapturedStep

        step = CapturedStep(self._backend, form, inputs)
        step.capture(self._run_captured, on, work, places, inputs)
        return step

    def _run_captured(self, step: CapturedStep, inputs: Sequence[torch.Tensor]) -> Out:
        shape = (step.form.num_rows, self.attention.num_qo_heads, self.attention.manager.head_dim)

        def attend(q: torch.Tensor, layer: int) -> torch.Tensor:
            self.attention.check_queries(q, shape)
            return step.attend(q, layer)

        return self.model(DecodeStep(self.attention.manager, step.places, attend, self._launcher), *inputs)

    def _without_graph(self, data: FlashInferPackedData | FlashInferHybridData, places: Int32Array) -> DecodeStep:
        self.attention.plan(data)
        manager = self.attention.manager
        on_device = sent(places, manager.device)
        return DecodeStep(manager, on_device, lambda q, layer: self.attention.run(q, layer=layer), self._launcher)
