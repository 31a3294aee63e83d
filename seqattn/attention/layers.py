"""Decoding with a CUDA graph for each layer's attention: for models whose own code cannot be captured.

    model's own code ─▶ q, k, v ─▶ one launch: k, v to their pages, q to fixed memory ─▶ graph of the layer ─▶ out
    runs as it is                  `seqattn.row_kernel`                                  gather, levels, merge

What attention launches in a layer, up to six kernels on three streams, then takes the CPU two launches. The graphs are
those of `DecodeGraphs` cut into layers: the same forms, the same fixed memory, planned in the same way for each step.

A model that does the same in every step mostly finds its q, k and v in the same memory again. For rows that come from
where they were before, one graph does both: it is captured for their addresses, and replayed only for these.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field

from seqattn.attention.captured import CapturedStep
from seqattn.attention.capturing import capturing
from seqattn.attention.graphs import DecodeGraphs
from seqattn.errors import LengthError, TensorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from seqattn.attention.calls import Work
    from seqattn.attention.fixed import StepForm
    from seqattn.attention.flashinfer_backend import FlashInferBackend
    from seqattn.attention.front import PagedAttention
    from seqattn.attention.step import DecodeStep
    from seqattn.packed import FlashInferHybridData, FlashInferPackedData
    from seqattn.row_kernel import RowTaker

__all__ = ["LayerGraphs", "LayerStep"]

_log = logging.getLogger("seqattn")
#: addresses of a layer's rows for which there are graphs, and that are looked at: a model that never comes back to
#: where it was is left alone
_MOST_PLACES = 4
_MOST_SEEN = 32
#: how many times as many steps are seen before a form that belongs to one batch is captured
_PATIENCE = 4


class LayerGraphs:
    """Graphs of each layer's attention in decode steps; belongs to one thread and one stream, like its attention.

    Args:
        attention: with the backend "flashinfer"; with another every step is computed without graphs.
        batch_sizes: to which batches are padded; larger batches are computed without graphs.
        max_tokens: of a sequence, as in `DecodeGraphs`.
        capture_after: steps of the same form that are seen before it is captured; four times as many of one that
            ends with its batch.
        max_graphs: the least recently used forms beyond are dropped.

    Raises:
        BadValueError: no batch size, or a number below 1.
    """

    def __init__(
        self,
        attention: PagedAttention,
        batch_sizes: Sequence[int],
        *,
        max_tokens: int,
        capture_after: int = 2,
        max_graphs: int = 16,
    ) -> None:
        self._graphs = _Forms(
            attention,
            lambda *_: None,  # the model runs outside, layer by layer
            batch_sizes,
            max_tokens=max_tokens,
            capture_after=capture_after,
            max_graphs=max_graphs,
        )

    @property
    def num_captures(self) -> int:
        """Forms that were captured, a graph for each layer."""
        return self._graphs.num_captures

    @property
    def num_replays(self) -> int:
        """Steps that were computed with graphs."""
        return self._graphs.num_replays

    @property
    def num_eager(self) -> int:
        """Steps that were computed without."""
        return self._graphs.num_eager

    def begin(self, data: FlashInferPackedData | FlashInferHybridData) -> LayerStep | DecodeStep:
        """A decode step, ready for its layers; valid until the next one.

        Args:
            data: the batch, plain or hybrid, packed for one query row each; on the CPU.

        Returns:
            A `LayerStep`, or a `DecodeStep` where no graph fits. After a capture that failed, of which one logged line
            tells, none does.

        Raises:
            What `DecodeGraphs.replay` raises of `data`; nothing is written then.

        Cost on the CPU: that of `PagedAttention.plan`; waits for the copies of the step before, not for its kernels.
        """
        graphs = self._graphs
        plan, places = graphs._checked(data, ())
        found = graphs._fitting(plan, places, ())
        if found is None:
            graphs.num_eager += 1
            return graphs._without_graph(data, places)
        graphs.num_replays += 1
        step, work = found
        assert isinstance(step, LayerStep)
        step.begin(work, places)
        return step


@define(slots=True, eq=False)
class _Layer:
    """The graphs of one layer.

    Attributes:
        take: brings rows to where `attend` reads them.
        attend: a graph of the attention, and its output.
        seen: how often rows have come from an address.
        is_settled: no more graphs are captured for it.
        whole: by address, a graph of both and its output, with padding and as it is returned.
    """

    take: RowTaker
    attend: tuple[torch.cuda.CUDAGraph, torch.Tensor]
    seen: dict[tuple[object, ...], int] = field(factory=dict)
    is_settled: bool = False
    whole: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = field(factory=dict)


class LayerStep(CapturedStep):
    """A decode step of one form: for each layer a launch that takes its rows, and a graph of its attention.

    Attributes:
        num_in_place: layers that were computed by one graph, from rows where they had been before.
    """

    def __init__(self, backend: FlashInferBackend, form: StepForm) -> None:
        super().__init__(backend, form, ())
        manager = backend.manager
        shape = (form.num_rows, backend.num_qo_heads, manager.head_dim)
        self._q = torch.zeros(shape, dtype=manager.dtype, device=backend.device)
        self._layers: list[_Layer] = []
        self._results: list[torch.Tensor] = []
        self._num_rows = 0
        self._seen: tuple[object, ...] | None = None
        self._on: tuple[Any, torch.cuda.Stream] | None = None
        self.num_in_place = 0

    def record(self, on: tuple[Any, torch.cuda.Stream], work: Work, places: npt.NDArray[np.int32]) -> None:
        """Records a graph for each layer; the arguments are those of `CapturedStep.capture`."""
        from seqattn.row_kernel import RowTaker

        self._write(work, places, ())
        torch.cuda.empty_cache()  # during a capture, memory that torch keeps for later cannot be had
        self._on, manager = on, self._backend.manager
        stream, device = on[1], self._backend.device
        main = torch.cuda.current_stream(device)
        stream.wait_stream(main)
        with torch.no_grad(), torch.cuda.device(device):
            try:
                with torch.cuda.stream(stream):
                    self.attend(self._q, 0)  # what is loaded at the first call is loaded now
            finally:  # memory that is given back is not used anew before that
                main.wait_stream(stream)
        for layer in range(manager.num_layers):
            caches = manager.layer_tensors(layer)
            if manager.kv_layout == "HND":
                caches = caches[0].transpose(1, 2), caches[1].transpose(1, 2)
            self._layers.append(_Layer(RowTaker(self._q, caches, self.places), self._recorded(layer, None)))

    def _recorded(self, layer: int, rows: tuple[torch.Tensor, ...] | None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph of a layer's attention, that takes `rows` from where they are; and its output."""
        assert self._on is not None
        pool, stream = self._on
        graph = torch.cuda.CUDAGraph()
        # Memory made for inference alone could not be written by later graphs outside of it.
        with (
            capturing(),
            torch.inference_mode(mode=False),
            torch.no_grad(),
            torch.cuda.device(self._backend.device),
            torch.cuda.stream(stream),
        ):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                if rows is not None:
                    self._layers[layer].take(*rows)
                out = self.attend(self._q, layer)
            finally:
                graph.capture_end()
        return graph, out

    def begin(self, work: Work, places: npt.NDArray[np.int32]) -> None:
        """Brings a step's tables into the fixed memory."""
        self._write(work, places, ())
        num_rows = places.shape[1]
        if num_rows != self._num_rows:
            self._num_rows, self._seen = num_rows, None
            self._results = [layer.attend[1][:num_rows][None] for layer in self._layers]
            for layer in self._layers:
                layer.whole = {key: (graph, out, out[:num_rows][None]) for key, (graph, out, _) in layer.whole.items()}

    def attend_heads(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, layer: int) -> torch.Tensor:
        """Writes each sequence's new key and value, then attends over all its tokens.

        Args:
            q: [1, num_qo_heads, rows, head_dim] of the cache's dtype, on its device, with a row for each sequence.
            keys: [1, num_heads, rows, head_dim], likewise.
            values: likewise.
            layer: the layer.

        Returns:
            [1, rows, num_qo_heads, head_dim]; it lies in memory of the graph, and is valid until the next layer's call.

        Raises:
            TensorError: a wrong shape, dtype or device.
            LengthError: `layer` is out of range.
        """
        seen = (q.shape, keys.shape, values.shape, q.dtype, keys.dtype, values.dtype)
        if seen != self._seen:
            self._check(q, keys, values)
            self._seen = seen
        if not 0 <= layer < len(self._layers):
            raise LengthError(f"layer {layer} is not in [0, {len(self._layers)})")
        found = self._layers[layer]
        key = (q.data_ptr(), keys.data_ptr(), values.data_ptr(), q.stride(), keys.stride(), values.stride())
        whole = found.whole.get(key)
        if whole is not None:
            self.num_in_place += 1
            whole[0].replay()
            return whole[2]
        found.take(q, keys, values)
        found.attend[0].replay()
        self._note(found, key, (q, keys, values), layer)
        return self._results[layer]

    def _note(self, found: _Layer, key: tuple[object, ...], rows: tuple[torch.Tensor, ...], layer: int) -> None:
        """Captures a graph of both for rows that have come from there before."""
        if found.is_settled or len(found.whole) >= _MOST_PLACES or len(found.seen) > _MOST_SEEN:
            return
        found.seen[key] = found.seen.get(key, 0) + 1
        if found.seen[key] > 1:
            try:
                graph, out = self._recorded(layer, rows)
            except RuntimeError as error:  # the layer has been computed; it goes on with two launches
                found.is_settled = True
                _log.warning("layer %d goes on with two launches: a capture failed: %s", layer, error)
                return
            found.whole[key] = (graph, out, out[: self._num_rows][None])

    def _check(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        manager = self._backend.manager
        heads = (self._backend.num_qo_heads, manager.num_heads, manager.num_heads)
        for name, tensor, num in zip(("q", "keys", "values"), (q, keys, values), heads, strict=True):
            want = (1, num, self._num_rows, manager.head_dim)
            if tensor.shape != want or tensor.dtype != manager.dtype or tensor.device != manager.device:
                raise TensorError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, but the step needs "
                    f"{manager.dtype} {list(want)} on {manager.device}"
                )


class _Forms(DecodeGraphs[Any]):
    """Finds and captures forms; its steps are `LayerStep`s."""

    def _steps_before(self, form: StepForm) -> int:
        """A form with tables ends when a sequence leaves: capturing it takes the time of a few steps."""
        return super()._steps_before(form) * (_PATIENCE if any(call.tables for call in form.calls) else 1)

    def _recorded(
        self,
        form: StepForm,
        on: tuple[Any, torch.cuda.Stream],
        work: Work,
        places: npt.NDArray[np.int32],
        inputs: Sequence[torch.Tensor],  # noqa: ARG002  there are none
    ) -> CapturedStep:
        step = LayerStep(self._backend, form)
        step.record(on, work, places)
        return step
