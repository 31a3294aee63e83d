"""Decode steps on the CPU, where nothing is captured, or fails: the same calls, the same results, the same errors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from seqattn import CacheDescriptor, DecodeGraphs, DecodeStep, PagedAttention, PagedKVCacheManager
from seqattn.attention.calls import Choice, Work, work_of
from seqattn.attention.fixed import StepForm
from seqattn.attention.plan import BatchPlan, plan_batch
from seqattn.errors import BadValueError, LengthError, PageError, SharedPageError, TensorError
from seqattn.hybrid import pack_hybrid
from seqattn.packed import FlashInferHybridData, HybridLevel

NUM_LAYERS, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 2, 4, 2, 8, 4


class Engine:
    """Sequences that share a prompt, and a model of two layers without weights."""

    def __init__(self, num_sequences: int = 3, layout: str = "NHD") -> None:
        sizes = (60, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu", layout)
        self.manager = PagedKVCacheManager(*sizes, num_layers=NUM_LAYERS)
        self.descriptor = CacheDescriptor(self.manager)
        self.descriptor.allocate(["prompt"], [10])
        self.ids = list(range(num_sequences))
        for i in self.ids:
            self.descriptor.fork("prompt", i)
        for cache in self.manager.get_memory_tensors():
            cache.normal_(generator=torch.Generator().manual_seed(0))
        self.attention = PagedAttention(self.manager, NUM_QO_HEADS)
        self.graphs = DecodeGraphs(self.attention, self.model, [4, 8], max_tokens=40)

    def model(self, step: DecodeStep, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(hidden) == step.num_rows
        for layer in range(NUM_LAYERS):
            keys = hidden[:, :NUM_KV_HEADS] * (layer + 1)
            step.append_kv(keys, keys.flip(-1), layer=layer)
            hidden = hidden + step.run(hidden, layer=layer)
        return hidden, hidden.sum((1, 2))

    def by_hand(self, hidden: torch.Tensor) -> torch.Tensor:
        packed, indptr = self.descriptor.pack_for_flashinfer(self.ids), torch.arange(len(self.ids) + 1)
        self.attention.plan(packed)
        for layer in range(NUM_LAYERS):
            keys = hidden[:, :NUM_KV_HEADS] * (layer + 1)
            self.manager.append_kv(keys, keys.flip(-1), packed, indptr, layer=layer)
            hidden = hidden + self.attention.run(hidden, layer=layer)
        return hidden


def inputs(num_rows: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, NUM_QO_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("hybrid", [False, True], ids=["plain", "hybrid"])
def test_steps_write_and_attend_as_the_calls_by_hand_do(hybrid: bool, layout: str) -> None:
    engine, other = Engine(layout=layout), Engine(layout=layout)
    order = [2, 0, 1]
    for seed in range(9):
        for each in (engine, other):
            each.descriptor.allocate_decoding(each.ids)
        hidden = inputs(3, seed)
        pack = engine.descriptor.pack_hybrid_for_flashinfer if hybrid else engine.descriptor.pack_for_flashinfer
        out, total = engine.graphs.replay(pack([engine.ids[i] for i in order]), hidden[order])
        expected = other.by_hand(hidden)[order]
        assert torch.allclose(out, expected, atol=1e-5)
        assert torch.allclose(total, expected.sum((1, 2)), atol=1e-3)
        for a, b in zip(engine.manager.get_memory_tensors(), other.manager.get_memory_tensors(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert engine.graphs.num_eager == 9
    assert engine.graphs.num_captures == engine.graphs.num_replays == 0


def rows_of(engine: Engine, num_new: list[int]) -> tuple[list[np.ndarray[Any, np.dtype[np.int32]]], list[int]]:
    """Each sequence's last tokens as sequences of their own: page tables and lengths."""
    tables, lens = [], []
    for i, new in zip(engine.ids, num_new, strict=True):
        total = engine.descriptor.num_tokens(i)
        for n in range(total - new + 1, total + 1):
            tables.append(engine.descriptor.seq_id_to_data[i].table[: -(-n // PAGE_SIZE)])
            lens.append(n)
    return tables, lens


@pytest.mark.parametrize("cost_model", [None, "auto"])
def test_several_tokens_of_a_sequence_are_rows_that_see_those_before_them(cost_model: Any) -> None:  # noqa: ANN401  either
    engine, other = Engine(), Engine()
    num_new = [6, 1, 3]
    for each in (engine, other):
        each.descriptor.allocate(each.ids, num_new)
    tables, lens = rows_of(engine, num_new)
    data = pack_hybrid(tables, lens, page_size=PAGE_SIZE, query_lens=None, cost_model=cost_model)
    hidden = inputs(sum(num_new), 0)
    out, _ = engine.graphs.replay(data, hidden)
    assert engine.graphs.replay_if_captured(data, hidden) is None, "nothing is captured here"
    packed, indptr = other.descriptor.pack_for_flashinfer(other.ids), torch.tensor([0, *np.cumsum(num_new)])
    other.attention.plan(packed, query_lens=num_new)
    for layer in range(NUM_LAYERS):
        keys = hidden[:, :NUM_KV_HEADS] * (layer + 1)
        other.manager.append_kv(keys, keys.flip(-1), packed, indptr, layer=layer)
        hidden = hidden + other.attention.run(hidden, layer=layer)
    assert torch.allclose(out, hidden, atol=1e-5)
    for a, b in zip(engine.manager.get_memory_tensors(), other.manager.get_memory_tensors(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_slot_is_written_once() -> None:
    engine = Engine()
    engine.descriptor.allocate(engine.ids, [3, 3, 3])
    tables, lens = rows_of(engine, [3, 3, 3])
    data = pack_hybrid([*tables, tables[4]], [*lens, lens[4]], page_size=PAGE_SIZE, query_lens=None, cost_model=None)
    before = engine.manager.key_cache.clone()
    for call in (engine.graphs.replay, engine.graphs.replay_if_captured):
        with pytest.raises(PageError, match=r"slot 3 of page \d+ would be written for 2 sequences"):
            call(data, inputs(10, 0))
    assert torch.equal(engine.manager.key_cache, before)


def test_capturing_ahead_does_nothing_without_a_device() -> None:
    engine = Engine()
    engine.graphs.capture(inputs(1, 0))
    assert engine.graphs.num_captures == 0


def test_pages_that_may_not_be_written_are_refused_before_anything_is_written() -> None:
    engine = Engine()
    engine.descriptor.allocate_decoding(engine.ids)
    packed = engine.descriptor.pack_for_flashinfer(engine.ids)
    before = engine.manager.key_cache.clone()
    page = engine.descriptor.seq_id_to_data[1].kv_page_indices[-1]
    engine.manager.ref([page])
    with pytest.raises(SharedPageError):
        engine.graphs.replay(packed, inputs(3, 0))
    engine.manager.unref([page])
    with pytest.raises(PageError, match="would be written for 2 sequences"):
        engine.graphs.replay(engine.descriptor.pack_for_flashinfer([0, 1, 0]), inputs(3, 0))
    engine.descriptor.release([1])
    with pytest.raises(PageError, match="is free"):
        engine.graphs.replay(packed, inputs(3, 0))
    assert torch.equal(engine.manager.key_cache, before)


def wrong_rows(engine: Engine) -> None:
    engine.graphs.replay(engine.descriptor.pack_for_flashinfer(engine.ids), inputs(2, 0))


def no_tensor(engine: Engine) -> None:
    engine.graphs.replay(engine.descriptor.pack_for_flashinfer(engine.ids), [[0.0]] * 3)  # type: ignore[arg-type]


def no_rows(engine: Engine) -> None:
    engine.graphs.replay(engine.descriptor.pack_for_flashinfer(engine.ids), torch.tensor(3.0))


def elsewhere(engine: Engine) -> None:
    engine.graphs.replay(engine.descriptor.pack_for_flashinfer(engine.ids), inputs(3, 0).to("meta"))


def many_queries(engine: Engine) -> None:
    data = engine.descriptor.pack_hybrid_for_flashinfer(engine.ids, query_lens=[1, 2, 1])
    engine.graphs.replay(data, inputs(3, 0))


def no_queries(engine: Engine) -> None:
    tensors = ([0, 0, 0], [0, 1, 2], [3, 4], [2, 2])
    level = HybridLevel(*(torch.tensor(values, dtype=torch.int32) for values in tensors))
    engine.graphs.replay(FlashInferHybridData((level,), torch.arange(2)), inputs(0, 0))


def other_data(engine: Engine) -> None:
    engine.graphs.replay([[1, 2]], inputs(3, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (wrong_rows, TensorError, "tensor of 3 rows"),
        (no_tensor, TensorError, "tensor of 3 rows"),
        (no_rows, TensorError, r"tensor of 3 rows, one a sequence, not shape \[\]"),
        (elsewhere, TensorError, "an input is on meta but the cache on cpu"),
        (many_queries, LengthError, "one query row for each sequence"),
        (no_queries, LengthError, "one query row for each sequence"),
        (other_data, TensorError, "plan needs"),
    ],
)
def test_a_bad_step_is_refused(call: Callable[[Engine], None], error: type[Exception], message: str) -> None:
    engine = Engine()
    engine.descriptor.allocate_decoding(engine.ids)
    with pytest.raises(error, match=message):
        call(engine)


def test_a_batch_without_sequences_has_no_rows() -> None:
    engine = Engine()
    for pack in (engine.descriptor.pack_for_flashinfer, engine.descriptor.pack_hybrid_for_flashinfer):
        out, total = engine.graphs.replay(pack([]), inputs(0, 0))
        assert (out.shape, total.shape) == ((0, NUM_QO_HEADS, HEAD_DIM), (0,))


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (torch.zeros(3, NUM_KV_HEADS, HEAD_DIM, dtype=torch.float16), TensorError),
        (torch.zeros(3, NUM_KV_HEADS + 1, HEAD_DIM), TensorError),
        (torch.zeros(2, NUM_KV_HEADS, HEAD_DIM), LengthError),
        ([0.0], TensorError),
    ],
    ids=["dtype", "heads", "rows", "list"],
)
def test_bad_keys_are_refused(rows: torch.Tensor, error: type[Exception]) -> None:
    engine = Engine()
    engine.descriptor.allocate_decoding(engine.ids)
    good = torch.zeros(3, NUM_KV_HEADS, HEAD_DIM)

    def model(step: DecodeStep, _: torch.Tensor) -> torch.Tensor:
        step.append_kv(good, rows)
        return good

    graphs = DecodeGraphs(engine.attention, model, [4], max_tokens=40)
    with pytest.raises(error):
        graphs.replay(engine.descriptor.pack_for_flashinfer(engine.ids), inputs(3, 0))


def test_sizes_must_be_positive_and_there_must_be_one() -> None:
    attention, model = Engine().attention, Engine().model
    for sizes, max_tokens in (([], 10), ([0], 10), ([4], 0)):
        with pytest.raises(BadValueError):
            DecodeGraphs(attention, model, sizes, max_tokens=max_tokens)
    for name in ("capture_after", "max_graphs"):
        with pytest.raises(BadValueError, match=name):
            DecodeGraphs(attention, model, [4], max_tokens=10, **{name: 0})


class Captures:
    """Graphs of an engine on the CPU whose calls are chosen as on a device; captures are noted by what they hold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = (40, 512, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
        self.manager = PagedKVCacheManager(*sizes)
        self.attention = PagedAttention(self.manager, NUM_QO_HEADS)
        self.graphs = DecodeGraphs(self.attention, lambda step, x: x, [4], max_tokens=4096)
        self.graphs._backend = SimpleNamespace(work=self.work)
        self.captured: list[tuple[int, int] | None] = []
        monkeypatch.setattr(self.graphs, "_captured", self.capture)

    def work(self, plan: BatchPlan) -> Work:
        return work_of(plan, [Choice("fa3"), Choice("decode")], 2, 512, has_spans=True)

    def capture(self, form: StepForm, _: Work, __: object, inputs: Any) -> object:  # noqa: ANN401  tensors
        self.captured.append(form.calls[0].span)
        self.graphs._steps[(form, *((x.shape[1:], x.dtype) for x in inputs))] = found = object()  # type: ignore[assignment]
        return found

    def used(self, first: int) -> tuple[int, int] | str | None:
        """The span of the graph for a step of three sequences on three pages from here on; or that there is none."""
        tables = [np.array([*range(first, first + 3), 30 + i], dtype=np.int32) for i in range(3)]
        data = pack_hybrid(tables, [1600] * 3, page_size=512, query_lens=None, cost_model=None)
        plan = plan_batch(self.manager, data, None, causal=True)
        found = self.graphs._fitting(plan, np.zeros((2, 3), dtype=np.int32), [inputs(3, 0)])
        return "eager" if found is None else found[1].calls[0].span


def test_a_prompt_in_one_piece_gets_a_graph_of_its_own_when_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Captures(monkeypatch)
    assert [found.used(5) for _ in range(34)] == ["eager", *[None] * 30, *[(5, 3)] * 3]
    assert found.captured == [None, (5, 3)]
    assert [found.used(first) for first in range(10, 20)] == [None] * 10, "other prompts use the graph for any"
    assert found.used(5) == (5, 3)
    assert len(found.captured) == 2


@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_graphs_of_memory_that_was_replaced_are_not_replayed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Captures(monkeypatch)
    assert [found.used(5) for _ in range(4)] == ["eager", None, None, None]
    for _ in range(2):
        setattr(found.manager, name, getattr(found.manager, name).clone())
        assert [found.used(5) for _ in range(4)] == ["eager", None, None, None]
    assert len(found.captured) == 3


class Failing:
    """An engine on the CPU that captures as on a device; a capture writes what a warm-up may have, then fails."""

    def __init__(self, error: Exception) -> None:
        self.engine, self.error, self.num_tries = Engine(), error, 0
        graphs: Any = self.engine.graphs
        choices = [Choice("fa3"), Choice("decode")]
        work: Any = lambda plan: work_of(plan, choices[-len(plan.levels) :], 2, PAGE_SIZE)  # noqa: E731
        graphs._backend, graphs._on = SimpleNamespace(work=work), ("pool", "stream")
        graphs._recorded = self.recorded
        self.graphs = graphs

    def recorded(self, _: StepForm, __: object, ___: Work, places: Any, rows: list[torch.Tensor]) -> None:  # noqa: ANN401  an array
        self.num_tries += 1
        step = DecodeStep(self.engine.manager, torch.from_numpy(places), lambda q, _: q * 7, None)
        self.engine.model(step, *rows)
        raise self.error

    def step(self, pack: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.graphs.replay(pack(self.engine.ids), hidden)[0]
        return out


@pytest.mark.parametrize("hybrid", [False, True], ids=["plain", "hybrid"])
def test_after_a_capture_that_fails_steps_are_right_without_graphs(
    hybrid: bool, caplog: pytest.LogCaptureFixture
) -> None:
    found, other = Failing(torch.cuda.OutOfMemoryError("out of memory")), Engine()
    engine, descriptor = found.engine, found.engine.descriptor
    found.graphs._steps["another form"] = object()
    for seed in range(4):
        for each in (engine, other):
            each.descriptor.allocate_decoding(each.ids)
        pack: Any = lambda ids: descriptor.pack_hybrid_for_flashinfer(ids, cost_model=None)  # noqa: E731
        out = found.step(pack if hybrid else descriptor.pack_for_flashinfer, inputs(3, seed))
        assert torch.allclose(out, other.by_hand(inputs(3, seed)), atol=1e-5)
        for a, b in zip(engine.manager.get_memory_tensors(), other.manager.get_memory_tensors(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding goes on without CUDA graphs: a capture failed: out of memory"
    ]
    found.graphs.capture(inputs(1, 0))
    assert (found.num_tries, found.graphs.num_eager, found.graphs.num_replays) == (1, 4, 0)
    assert not found.graphs.captures
    assert not found.graphs._steps, "what is not replayed any more holds no memory"


def test_of_captures_ahead_none_follows_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    found = Failing(RuntimeError("out of memory"))
    found.graphs.capture(inputs(1, 0))
    assert (found.num_tries, len(caplog.records)) == (1, 1)


def test_a_prompt_in_one_piece_is_not_captured_page_by_page_where_its_own_graph_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found, tries = Captures(monkeypatch), []
    monkeypatch.undo()
    graphs: Any = found.graphs

    def fails(form: StepForm, *_: object) -> None:
        tries.append(form.calls[0].span)
        raise RuntimeError("out of memory")

    graphs._recorded, graphs._on, graphs._capture_after = fails, ("pool", "stream"), 32
    assert [found.used(5) for _ in range(40)] == ["eager"] * 40
    assert tries == [(5, 3)]
    assert len(caplog.records) == 1


def test_a_mistake_of_the_model_is_raised_whether_or_not_it_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    found = Failing(RuntimeError("shapes cannot be multiplied"))
    graphs, descriptor = found.graphs, found.engine.descriptor
    descriptor.allocate_decoding(found.engine.ids)
    found.step(descriptor.pack_for_flashinfer, inputs(3, 0))

    def model(*_: object) -> None:
        raise found.error

    graphs.model = model
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        found.step(descriptor.pack_for_flashinfer, inputs(3, 0))
    assert (found.num_tries, len(caplog.records)) == (1, 1)


@pytest.mark.parametrize("error", [TensorError("keys are float16"), LengthError("layer 2"), TypeError(), KeyError("x")])
def test_what_is_not_of_cuda_reaches_the_caller_from_a_capture(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    found = Failing(error)
    pack = found.engine.descriptor.pack_for_flashinfer
    found.engine.descriptor.allocate_decoding(found.engine.ids)
    found.step(pack, inputs(3, 0))
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            found.step(pack, inputs(3, 0))
        assert caught.value is error
    assert found.graphs.captures
    assert not caplog.records
