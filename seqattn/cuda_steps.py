"""Measuring steps of attention on a CUDA device: graphs of a few layers, replayed between two events."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seqattn.attention.calls import Choice
from seqattn.attention.capturing import capturing
from seqattn.attention.front import PagedAttention
from seqattn.attention.plan import plan_batch
from seqattn.cache import PagedKVCacheManager
from seqattn.calibrate import PAGE_SIZE, CalibrationBatch
from seqattn.errors import TensorError
from seqattn.hybrid import pack_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from seqattn.device import Heads

__all__ = ["CudaSteps", "graph_us", "replay_times"]

#: layers of a graph, each with memory of its own, so that the L2 cache keeps nothing from one replay to the next
_NUM_LAYERS = 4
_WARM_UPS, _REPEATS = 2, 11


class CudaSteps:
    """Times ways to compute batches; a `Timer` of `seqattn.calibrate`.

    Args:
        heads: the model's.
        device: a CUDA device with flashinfer.

    Raises:
        TensorError: the device or its packages cannot run these kernels.
    """

    def __init__(self, heads: Heads, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise TensorError("torch finds no CUDA device: constants are measured on the device they are for")
        self.heads = heads
        self.device = device
        self._batch: CalibrationBatch | None = None
        self._attention: Any = None

    def most_tokens(self) -> int:
        """Different tokens that fit in a quarter of the free memory; at most 2**18."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(1 << 18, free // 4 // (_NUM_LAYERS * self.heads.token_bytes))

    def __call__(self, batch: CalibrationBatch, kept: Sequence[bool], slices: Sequence[int]) -> float:
        """Microseconds a layer."""
        if batch is not self._batch:
            self._load(batch)
        ones = np.ones_like(batch.lens)
        data = pack_runs(batch.tables, batch.lens, ones, batch.forest, list(kept), page_size=PAGE_SIZE)
        choices = [*(Choice("fa3", n) if n else Choice("fa2") for n in slices), Choice("decode")]
        attention = self._attention
        plan = plan_batch(attention.manager, data, None, causal=True)
        prepared = attention._impl.prepare(plan, choices)

        def layers() -> None:
            for layer in range(_NUM_LAYERS):
                attention._impl.run(self._q, layer, prepared, return_lse=False)

        return graph_us(layers) / _NUM_LAYERS

    def _load(self, batch: CalibrationBatch) -> None:
        heads = self.heads
        self._attention = None  # the memory of the batch before is free for this one
        dtype = torch.bfloat16
        sizes = (batch.shape.num_tokens // PAGE_SIZE, PAGE_SIZE, heads.num_kv_heads, heads.head_dim, dtype)
        manager = PagedKVCacheManager(*sizes, self.device, num_layers=_NUM_LAYERS)
        for cache in manager.get_memory_tensors():
            cache.normal_()
        shape = (batch.shape.batch, heads.num_qo_heads, heads.head_dim)
        self._q = torch.randn(shape, device=self.device, dtype=dtype)
        self._attention = PagedAttention(manager, heads.num_qo_heads, backend="flashinfer")
        self._batch = batch


def graph_us(layers: Callable[[], object]) -> float:
    """Microseconds of a graph of what `layers` launches; the median of a few replays."""
    return float(statistics.median(replay_times(layers, _WARM_UPS + _REPEATS)[_WARM_UPS:]))


def replay_times(layers: Callable[[], object], repeats: int) -> list[float]:
    """Captures what `layers` launches in a CUDA graph, and replays it: microseconds of the device for each replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(), torch.cuda.graph(graph):
        layers()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return times
