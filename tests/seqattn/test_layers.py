"""Which graphs the layers of a decode step go through, and how graphs are recorded; stand-ins for a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seqattn import CacheDescriptor, DecodeStep, PagedAttention, PagedKVCacheManager
from seqattn.attention.calls import Choice, work_of
from seqattn.attention.captured import CapturedStep
from seqattn.attention.layers import LayerGraphs, LayerStep, _Layer
from seqattn.errors import LengthError, SharedPageError, TensorError

NUM_ROWS, HEADS, KV_HEADS, DIM = 3, 4, 2, 8


class Recorded:
    """Notes what a step launches: "take", "attend" and, for both in one graph, "whole"."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.captured: list[int] = []
        step: Any = object.__new__(LayerStep)
        manager = SimpleNamespace(num_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32, device=torch.device("cpu"))
        step._backend = SimpleNamespace(num_qo_heads=HEADS, manager=manager)
        step._recorded = self.recorded
        step._write = lambda *_: None
        step._num_rows, step._seen, step.num_in_place = 0, None, 0
        out = torch.zeros(4, HEADS, DIM)  # the form has four rows
        take: Any = lambda *_: self.launched.append("take")  # noqa: E731
        step._layers = [_Layer(take, (self.graph("attend"), out)) for _ in range(2)]
        self.step: LayerStep = step
        self.begin(NUM_ROWS)

    def begin(self, num_rows: int) -> None:
        work: Any = None
        self.step.begin(work, torch.zeros(2, num_rows, dtype=torch.int32).numpy())

    def graph(self, name: str) -> Any:  # noqa: ANN401  in place of a CUDAGraph
        return SimpleNamespace(replay=lambda: self.launched.append(name))

    def recorded(self, layer: int, rows: tuple[torch.Tensor, ...]) -> tuple[Any, torch.Tensor]:
        self.captured.append(layer)
        assert len(rows) == 3
        return self.graph("whole"), torch.ones(4, HEADS, DIM)

    def attend(self, rows: tuple[torch.Tensor, ...], layer: int = 0) -> list[str]:
        """What a layer launches."""
        self.launched.clear()
        out = self.step.attend_heads(*rows, layer=layer)
        assert out.shape == (1, rows[0].shape[2], HEADS, DIM)
        return self.launched[:]


def rows(num_rows: int = NUM_ROWS) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(1, heads, num_rows, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))


def test_rows_that_come_back_to_where_they_were_take_one_graph_from_the_third_time() -> None:
    found, here = Recorded(), rows()
    assert [found.attend(here) for _ in range(4)] == [["take", "attend"]] * 2 + [["whole"]] * 2
    assert found.captured == [0]
    assert found.step.num_in_place == 2
    assert found.attend(here, layer=1) == ["take", "attend"], "each layer has graphs of its own"


def test_rows_that_move_are_taken_from_where_they_are() -> None:
    found, here, there = Recorded(), rows(), rows()
    for _ in range(3):
        found.attend(here)
    assert found.attend(there) == ["take", "attend"]
    turned = (here[0], here[1], here[2].transpose(2, 3).contiguous().transpose(2, 3))
    assert found.attend(turned) == ["take", "attend"]
    strided = tuple(tensor.as_strided(tensor.shape, (0, 0, DIM, 1)) for tensor in here)
    assert found.attend(strided) == ["take", "attend"], "the same addresses, other strides"
    assert found.attend(here) == ["whole"]


def test_a_model_that_never_comes_back_is_left_alone() -> None:
    found, kept = Recorded(), [rows() for _ in range(50)]
    for here in kept:
        found.attend(here)
    assert found.attend(kept[-1]) == found.attend(kept[-1]) == ["take", "attend"]
    assert not found.captured


def test_a_few_places_have_graphs_and_no_more() -> None:
    found, kept = Recorded(), [rows() for _ in range(6)]
    for _ in range(3):
        launched = [found.attend(here) for here in kept]
    assert launched == [["whole"]] * 4 + [["take", "attend"]] * 2


def test_another_number_of_sequences_gets_as_many_rows_and_keeps_the_graphs() -> None:
    found, here = Recorded(), rows(NUM_ROWS)
    for _ in range(3):
        found.attend(here)
    fewer = tuple(tensor[:, :, :2] for tensor in here)
    found.begin(2)
    assert found.attend(fewer) == ["whole"], "from the same addresses"
    with pytest.raises(
        TensorError, match=r"q is torch.float32 \[1, 4, 3, 8\] on cpu, but the step needs .*\[1, 4, 2, 8\]"
    ):
        found.attend(here)


@pytest.mark.parametrize("which", range(3))
def test_rows_that_do_not_fit_are_refused_and_nothing_is_launched(which: int) -> None:
    found = Recorded()
    for change in (torch.Tensor.double, lambda t: t[:, :1], lambda t: t[:, :, :2], lambda t: t[..., :4]):
        bad: Any = [change(tensor) if i == which else tensor for i, tensor in enumerate(rows())]
        with pytest.raises(TensorError, match=("q is", "keys is", "values is")[which]):
            found.step.attend_heads(*bad, layer=0)
    q, keys, values = rows()
    for layer in (-1, 2):
        with pytest.raises(LengthError, match=f"layer {layer} is not in"):
            found.step.attend_heads(q, keys, values, layer=layer)
    assert not found.launched


def test_without_cuda_every_step_is_one_without_graphs() -> None:
    manager = PagedKVCacheManager(16, 4, KV_HEADS, DIM, torch.float32, "cpu", num_layers=2)
    descriptor = CacheDescriptor(manager)
    descriptor.allocate(["a", "b"], [5, 2])
    graphs = LayerGraphs(PagedAttention(manager, HEADS), [8], max_tokens=32)
    assert isinstance(graphs.begin(descriptor.pack_for_flashinfer(["a", "b"])), DecodeStep)
    assert (graphs.num_captures, graphs.num_replays, graphs.num_eager) == (0, 0, 1)
    manager.ref(descriptor.seq_id_to_data["b"].kv_page_indices)
    with pytest.raises(SharedPageError):
        graphs.begin(descriptor.pack_for_flashinfer(["b"]))


def failing(*_: object, **__: object) -> Any:  # noqa: ANN401  in place of a graph
    raise torch.cuda.OutOfMemoryError("out of memory")


def test_a_layer_whose_capture_fails_goes_on_with_two_launches(caplog: pytest.LogCaptureFixture) -> None:
    found, here = Recorded(), rows()
    found.step._recorded = failing  # type: ignore[method-assign]
    assert [found.attend(here) for _ in range(4)] == [["take", "attend"]] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "layer 0 goes on with two launches: a capture failed: out of memory"
    ]


def test_after_a_capture_that_fails_steps_go_on_without(caplog: pytest.LogCaptureFixture) -> None:
    manager = PagedKVCacheManager(16, 4, KV_HEADS, DIM, torch.float32, "cpu", num_layers=2)
    descriptor = CacheDescriptor(manager)
    descriptor.allocate(["a", "b"], [5, 2])
    graphs = LayerGraphs(PagedAttention(manager, HEADS), [8], max_tokens=32)
    forms: Any = graphs._graphs
    forms._backend = SimpleNamespace(work=lambda plan: work_of(plan, [Choice("decode")], 2, 4))
    forms._on, forms._recorded = ("pool", "stream"), failing
    for _ in range(4):
        assert isinstance(graphs.begin(descriptor.pack_for_flashinfer(["a", "b"])), DecodeStep)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding goes on without CUDA graphs: a capture failed: out of memory"
    ]
    assert (graphs.num_captures, graphs.num_replays, graphs.num_eager) == (0, 0, 4)


class FakeStream:
    """Notes which streams it waits for."""

    def __init__(self) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a capture calls of CUDA: a current stream, and the stream that each graph was recorded on."""
    found = SimpleNamespace(main=FakeStream(), recorded=[], is_recording=False)

    @contextmanager
    def graph(_: object, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "other threads may go on"
        found.recorded.append((pool, stream))
        found.is_recording = True
        yield
        found.is_recording = False

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: found.main)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return found


def captured() -> Any:  # noqa: ANN401  a step without what needs a device
    step: Any = object.__new__(CapturedStep)
    step._backend, step._inputs, step._write = SimpleNamespace(device="cuda:1"), [], lambda *_: None
    return step


def test_graphs_are_recorded_on_the_stream_that_they_are_given(cuda: SimpleNamespace) -> None:
    """Not on torch's own, which may be another device's and record nothing."""
    stream, seen = FakeStream(), []
    captured().capture(lambda *_: seen.append(cuda.is_recording), ("pool", stream), None, None, [])
    assert cuda.recorded == [("pool", stream)]
    assert seen == [False, True]
    assert (stream.waited, cuda.main.waited) == ([cuda.main], [stream])


def test_a_model_that_fails_leaves_no_launches_that_nobody_waits_for(cuda: SimpleNamespace) -> None:
    def model(*_: object) -> None:
        raise RuntimeError("out of memory")

    stream = FakeStream()
    with pytest.raises(RuntimeError, match="out of memory"):
        captured().capture(model, ("pool", stream), None, None, [])
    assert cuda.main.waited == [stream]
    assert not cuda.recorded
