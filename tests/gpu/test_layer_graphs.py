"""Graphs of each layer's attention against steps computed without: sequences that grow, come and go."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from seqattn.attention.calls import Choice, Work
from seqattn.attention.layers import LayerGraphs, LayerStep
from seqattn.attention.plan import BatchPlan
from seqattn.errors import LengthError, TensorError
from tests.gpu.batches import relative_error
from tests.gpu.test_decode_graphs import NUM_LAYERS, WAYS, Engine, compare

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


class ByLayer:
    """The engine's model with graphs of its attention, called like `DecodeGraphs`."""

    def __init__(self, engine: Engine, batch_sizes: list[int], max_tokens: int = 1100) -> None:
        self.engine = engine
        self.graphs = LayerGraphs(engine.attention, batch_sizes, max_tokens=max_tokens)

    def replay(self, data: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401  either kind
        step = self.graphs.begin(data)
        if not isinstance(step, LayerStep):
            return self.engine.model(step, hidden)
        for layer in range(NUM_LAYERS):
            q = hidden.transpose(0, 1)[None]
            keys = q[:, : self.engine.num_kv_heads]
            out = step.attend_heads(q, keys, keys.flip(-1), layer=layer)[0]
            hidden = hidden + self.engine.mixed(out.contiguous(), layer)
        return hidden, hidden.float().sum((1, 2))


@pytest.mark.parametrize(("heads", "layout"), [((32, 8), "NHD"), ((32, 8), "HND"), ((8, 1), "NHD")])
@pytest.mark.parametrize("batch_size", [20, 64])
def test_plain_layers_are_replayed_with_new_pages_and_lengths(
    heads: tuple[int, int], layout: str, batch_size: int
) -> None:
    engine = Engine(heads, layout)
    by_layer = ByLayer(engine, [8, batch_size])
    compare(engine, by_layer, 60, hybrid=False)  # type: ignore[arg-type]
    assert (by_layer.graphs.num_captures, by_layer.graphs.num_eager) == (1, 1)


@pytest.mark.parametrize("way", WAYS)
def test_hybrid_layers_are_replayed_with_new_pages_and_lengths(way: str) -> None:
    engine = Engine(num_sequences=24)
    by_layer = ByLayer(engine, [32])
    backend = by_layer.graphs._graphs._backend
    plain_work = backend.work

    def work(plan: BatchPlan, _: object = None) -> Work:
        found: Work = plain_work(plan, [WAYS[way]] * (len(plan.levels) - 1) + [Choice("decode")])
        return found

    backend.work = work
    compare(engine, by_layer, 60, hybrid=True)  # type: ignore[arg-type]
    assert by_layer.graphs.num_replays >= 40


def test_what_does_not_fit_a_step_is_refused() -> None:
    engine = Engine()
    graphs = LayerGraphs(engine.attention, [20], max_tokens=1100, capture_after=1)
    engine.descriptor.allocate_decoding(engine.ids)
    step = graphs.begin(engine.data(hybrid=False))  # type: ignore[arg-type]
    assert isinstance(step, LayerStep)
    q = torch.zeros(1, 32, 20, 128, device="cuda", dtype=torch.bfloat16)
    for bad in (q[:, :, :19], q.float(), q[:, :16], q[0]):
        with pytest.raises(TensorError, match="q is"):
            step.attend_heads(bad, q[:, :8], q[:, :8], layer=0)
    with pytest.raises(TensorError, match="values is"):
        step.attend_heads(q, q[:, :8], q[:, :9], layer=0)
    with pytest.raises(LengthError, match="layer 3"):
        step.attend_heads(q, q[:, :8], q[:, :8], layer=3)
    assert step.attend_heads(q, q[:, :8], q[:, :8], layer=2).shape == (1, 20, 32, 128)


@pytest.mark.parametrize("hybrid", [False, True])
def test_rows_that_stay_where_they_are_take_one_graph_and_rows_that_move_are_found(hybrid: bool) -> None:
    engine, other = Engine(), Engine()
    graphs = LayerGraphs(engine.attention, [24], max_tokens=1100)
    homes = [torch.zeros(3, NUM_LAYERS, 32, 24, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    steps = set()
    for number in range(40):
        if number == 20:
            for each in (engine, other):
                each.finish()
        home = homes[number in {13, 14, 27}]
        for each in (engine, other):
            each.descriptor.allocate_decoding(each.ids)
        num = len(engine.ids)
        fresh = torch.randn(num, 32, 128, device="cuda", generator=engine.generator).bfloat16()
        step = graphs.begin(engine.data(hybrid=hybrid))  # type: ignore[arg-type]
        hidden = fresh
        if not isinstance(step, LayerStep):
            hidden, _ = engine.model(step, hidden)
        else:
            steps.add(step)
            for layer in range(NUM_LAYERS):
                q, keys, values = home[:, layer, :, :num][:, None]
                q.copy_(hidden.transpose(0, 1)[None])
                keys[:, :8].copy_(q[:, :8])
                values[:, :8].copy_(q[:, :8].flip(-1))
                out = step.attend_heads(q, keys[:, :8], values[:, :8], layer=layer)[0]
                home.normal_()  # nobody reads the rows later
                hidden = hidden + engine.mixed(out.contiguous(), layer)
        assert relative_error(hidden, other.by_hand(fresh).float()) < 1e-2
    for a, b in zip(engine.manager.get_memory_tensors(), other.manager.get_memory_tensors(), strict=True):
        assert relative_error(a, b.float()) < 1e-2
    assert sum(step.num_in_place for step in steps) > 20 * NUM_LAYERS


def test_no_older_graph_is_destroyed_by_a_collection_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may collect garbage at any new container; a graph that the capturing thread destroys ends its capture."""
    older = [torch.cuda.CUDAGraph()]
    with torch.cuda.graph(older[0]):
        torch.zeros(8, device="cuda").add_(1)
    plain, is_armed, was_armed = LayerStep.attend, False, 0

    def collect(phase: str, _: dict[str, int]) -> None:
        if is_armed and phase == "start":
            older.clear()  # as if the collection had found it

    def attend(step: LayerStep, q: torch.Tensor, layer: int) -> torch.Tensor:
        nonlocal is_armed, was_armed
        is_armed = torch.cuda.is_current_stream_capturing()
        was_armed += is_armed
        assert len([[i] for i in range(1000)]) == 1000
        is_armed = False
        return plain(step, q, layer)

    monkeypatch.setattr(LayerStep, "attend", attend)
    engine = Engine(num_sequences=8)
    by_layer = ByLayer(engine, [8])
    threshold = gc.get_threshold()
    gc.set_threshold(10, 10, 10)
    gc.callbacks.append(collect)
    try:
        compare(engine, by_layer, 4, hybrid=False)  # type: ignore[arg-type]
    finally:
        gc.callbacks.remove(collect)
        gc.set_threshold(*threshold)
    assert was_armed >= NUM_LAYERS
    assert older, "a collection began during a capture"
    assert (by_layer.graphs.num_captures, by_layer.graphs.num_eager) == (1, 1), "a capture that fails leaves none"
