"""Decoding with a CUDA graph for each layer's attention: for models whose own code cannot be captured.

    model's own code ─▶ q, k, v ─▶ one launch: k, v to their pages, q to fixed memory ─▶ graph of the layer ─▶ out
    runs as it is                  `seqattn.row_kernel`                                  gather, levels, merge

What attention launches in a layer, up to six kernels on three streams, then takes the CPU two launches. The graphs are
those of `DecodeGraphs` cut into layers: the same forms, the same fixed memory, planned in the same way for each step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from seqattn.attention.captured import CapturedStep
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


class LayerGraphs:
    """Graphs of each layer's attention in decode steps; belongs to one thread and one stream, like its attention.

    Args:
        attention: with the backend "flashinfer"; with another every step is computed without graphs.
        batch_sizes: to which batches are padded; larger batches are computed without graphs.
        max_tokens: of a sequence, as in `DecodeGraphs`.
        capture_after: steps of the same form that are seen before it is captured.
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
            _no_model,
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
            A `LayerStep`, or a `DecodeStep` where no graph fits.

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


class LayerStep(CapturedStep):
    """A decode step of one form: for each layer a launch that takes its rows, and a graph of its attention."""

    def __init__(self, backend: FlashInferBackend, form: StepForm) -> None:
        super().__init__(backend, form, ())
        manager = backend.manager
        shape = (form.num_rows, backend.num_qo_heads, manager.head_dim)
        self._q = torch.zeros(shape, dtype=manager.dtype, device=backend.device)
        self._layers: list[tuple[RowTaker, torch.cuda.CUDAGraph, torch.Tensor]] = []
        self._results: list[torch.Tensor] = []
        self._num_rows = 0
        self._seen: tuple[object, ...] | None = None

    def record(self, on: tuple[Any, torch.cuda.Stream], work: Work, places: npt.NDArray[np.int32]) -> None:
        """Records a graph for each layer; the arguments are those of `CapturedStep.capture`."""
        self._write(work, places, ())
        pool, stream = on
        device = self._backend.device
        main = torch.cuda.current_stream(device)
        stream.wait_stream(main)
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
            try:
                self.attend(self._q, 0)  # what is loaded at the first call is loaded now
            finally:  # memory that is given back is not used anew before that
                main.wait_stream(stream)
            for layer in range(self._backend.manager.num_layers):
                self._layers.append(self._recorded(layer, pool))
        main.wait_stream(stream)

    def _recorded(self, layer: int, pool: Any) -> tuple[RowTaker, torch.cuda.CUDAGraph, torch.Tensor]:  # noqa: ANN401  torch's, untyped
        from seqattn.row_kernel import RowTaker

        manager = self._backend.manager
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool)
        try:
            out = self.attend(self._q, layer)
        finally:
            graph.capture_end()
        key_cache, value_cache = manager.layer_tensors(layer)
        if manager.kv_layout == "HND":
            key_cache, value_cache = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
        return RowTaker(self._q, (key_cache, value_cache), self.places), graph, out

    def begin(self, work: Work, places: npt.NDArray[np.int32]) -> None:
        """Brings a step's tables into the fixed memory."""
        self._write(work, places, ())
        num_rows = places.shape[1]
        if num_rows != self._num_rows:
            self._results = [out[:num_rows][None] for _, _, out in self._layers]
            self._num_rows, self._seen = num_rows, None

    def attend_heads(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, layer: int) -> torch.Tensor:
        """Writes each sequence's new key and value, then attends over all its tokens.

        Args:
            q: [1, num_qo_heads, rows, head_dim] of the cache's dtype, on its device, with a row for each sequence.
            keys: [1, num_heads, rows, head_dim], likewise.
            values: likewise.
            layer: the layer.

        Returns:
            [1, rows, num_qo_heads, head_dim]; it lies in memory of the graph, and is valid until the next step.

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
        take, graph, _ = self._layers[layer]
        take(q, keys, values)
        graph.replay()
        return self._results[layer]

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


def _no_model(*_: object) -> None:
    """In place of a model: it runs outside, layer by layer."""
