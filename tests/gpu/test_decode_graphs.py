"""Replayed graphs against steps computed without: hundreds of steps, sequences that grow, come and go."""

from __future__ import annotations

import pytest
import torch

from seqattn import CacheDescriptor, DecodeGraphs, DecodeStep, PagedAttention, PagedKVCacheManager
from seqattn.attention.calls import Choice, Work
from seqattn.attention.captured import CapturedStep
from seqattn.attention.plan import BatchPlan
from seqattn.errors import SharedPageError
from tests.gpu.batches import MOST_ERROR, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

NUM_LAYERS, HEAD_DIM, PAGE_SIZE, PROMPT = 3, 128, 16, 700
WAYS = {"fa3": Choice("fa3"), "fa3 in slices": Choice("fa3", 3), "fa2": Choice("fa2")}


class Engine:
    """Sequences that share a prompt, and a model of three layers; two engines of one seed hold the same.

    One sequence in sixteen has `long` tokens more of its own; levels are then those that pay.
    """

    def __init__(
        self,
        heads: tuple[int, int] = (32, 8),
        layout: str = "NHD",
        num_sequences: int = 20,
        num_prompt_tokens: int = PROMPT,
        dtype: torch.dtype = torch.bfloat16,
        long: int = 0,
    ) -> None:
        self.num_prompt_tokens, self.long = num_prompt_tokens, long
        self.num_qo_heads, self.num_kv_heads = heads
        sizes = (3000 if long else 1500, PAGE_SIZE, self.num_kv_heads, HEAD_DIM, dtype, "cuda", layout)
        self.manager = PagedKVCacheManager(*sizes, num_layers=NUM_LAYERS)
        self.generator = torch.Generator("cuda").manual_seed(0)
        for cache in self.manager.get_memory_tensors():
            cache.normal_(generator=self.generator)
        self.descriptor = CacheDescriptor(self.manager)
        self.descriptor.allocate(["prompt", "elsewhere"], [num_prompt_tokens] * 2)
        self.prompt = "prompt"
        self.ids: list[int] = []
        for i in range(num_sequences):
            self.start(i)
        width = self.num_qo_heads * HEAD_DIM
        self.weights = torch.randn(NUM_LAYERS, width, width, device="cuda", generator=self.generator).to(dtype)
        self.weights *= width**-0.5
        self.attention = PagedAttention(self.manager, self.num_qo_heads)

    def start(self, i: int) -> None:
        self.descriptor.fork(self.prompt, i)
        self.descriptor.allocate([i], [1 + 7 * (i % 5) + self.long * (i % 16 == 7)])
        self.ids.append(i)

    def finish(self) -> None:
        self.descriptor.release([self.ids.pop(0)])

    def move(self) -> None:
        """Every sequence anew, on a prompt that lies elsewhere."""
        self.prompt = "elsewhere"
        for i in range(len(self.ids)):
            self.finish()
            self.start(5000 + i)

    def data(self, *, hybrid: bool) -> object:
        if hybrid:
            cost_model = self.attention.graph_cost_model if self.long else None
            return self.descriptor.pack_hybrid_for_flashinfer(self.ids, cost_model=cost_model)
        return self.descriptor.pack_for_flashinfer(self.ids)

    def model(self, step: DecodeStep, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in range(NUM_LAYERS):
            keys = hidden[:, : self.num_kv_heads]
            step.append_kv(keys, keys.flip(-1), layer=layer)
            hidden = hidden + self.mixed(step.run(hidden, layer=layer), layer)
        return hidden, hidden.float().sum((1, 2))

    def by_hand(self, hidden: torch.Tensor) -> torch.Tensor:
        packed = self.descriptor.pack_for_flashinfer(self.ids)
        self.attention.plan(packed)
        for layer in range(NUM_LAYERS):
            keys = hidden[:, : self.num_kv_heads]
            indptr = torch.arange(len(self.ids) + 1)
            self.manager.append_kv(keys, keys.flip(-1), packed, indptr, layer=layer)
            hidden = hidden + self.mixed(self.attention.run(hidden, layer=layer), layer)
        return hidden

    def mixed(self, out: torch.Tensor, layer: int) -> torch.Tensor:
        return (out.flatten(1) @ self.weights[layer]).view_as(out)


def compare(
    engine: Engine,
    graphs: DecodeGraphs[tuple[torch.Tensor, torch.Tensor]],
    num_steps: int,
    hybrid: bool,
    moves_before: int | None = None,
) -> None:
    """Steps of both engines; every fifth the batch changes a little, and before one of them the prompt moves."""
    heads = engine.num_qo_heads, engine.num_kv_heads
    dtype = engine.manager.dtype
    other = Engine(heads, engine.manager.kv_layout, len(engine.ids), engine.num_prompt_tokens, dtype, engine.long)
    generator = torch.Generator("cuda").manual_seed(1)
    for number in range(num_steps):
        for each in (engine, other):
            if number == moves_before:
                each.move()
            if number % 5 == 4:
                each.finish()
                if number % 20 != 19:
                    each.start(1000 + number)
            each.descriptor.allocate_decoding(each.ids)
        shape = (len(engine.ids), engine.num_qo_heads, HEAD_DIM)
        hidden = torch.randn(shape, device="cuda", generator=generator).to(dtype)
        out, total = graphs.replay(engine.data(hybrid=hybrid), hidden)  # type: ignore[arg-type]
        expected = other.by_hand(hidden)
        assert relative_error(out, expected.float()) < MOST_ERROR[dtype]
        assert relative_error(total, out.float().sum((1, 2))) < 1e-2
        for i in {engine.ids[0], engine.ids[-1]}:
            pages = engine.descriptor.seq_id_to_data[i].kv_page_indices
            assert list(pages) == list(other.descriptor.seq_id_to_data[i].kv_page_indices)
    for a, b in zip(engine.manager.get_memory_tensors(), other.manager.get_memory_tensors(), strict=True):
        assert relative_error(a, b.float()) < 1e-2


def blocks_of(step: CapturedStep) -> tuple[int, bool]:
    """Blocks for each KV head of a graph that decodes, and whether later plans are made as the one that it holds."""
    (wrapper,), (bound,) = step._wrappers, step._plans
    assert bound is not None
    return wrapper.made._plan_info[0], bound.is_repeated


@pytest.mark.parametrize(
    ("heads", "layout"),
    [((32, 8), "NHD"), ((32, 8), "HND"), ((8, 8), "NHD"), ((8, 1), "NHD"), ((32, 1), "NHD")],
)
@pytest.mark.parametrize("batch_size", [20, 64])
def test_plain_graphs_are_replayed_with_new_pages_and_lengths(
    heads: tuple[int, int], layout: str, batch_size: int
) -> None:
    engine = Engine(heads, layout)
    graphs = DecodeGraphs(engine.attention, engine.model, [8, batch_size], max_tokens=1100)
    compare(engine, graphs, 60, hybrid=False)
    assert (graphs.num_captures, graphs.num_eager) == (1, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [(32, 8), (8, 8)], ids=str)
def test_hybrid_graphs_are_replayed_with_new_pages_and_lengths(way: str, heads: tuple[int, int]) -> None:
    engine = Engine(heads, num_sequences=24)
    graphs = DecodeGraphs(engine.attention, engine.model, [32], max_tokens=1100)
    backend = graphs._backend
    plain_work = backend.work

    def work(plan: BatchPlan, _: object = None) -> Work:
        found: Work = plain_work(plan, [WAYS[way]] * (len(plan.levels) - 1) + [Choice("decode")])
        return found

    backend.work = work
    compare(engine, graphs, 60, hybrid=True)
    assert graphs.num_replays >= 40
    assert graphs.num_captures <= 3


def test_three_hundred_steps_use_a_few_graphs() -> None:
    engine = Engine()
    graphs = DecodeGraphs(engine.attention, engine.model, [32], max_tokens=2000, capture_after=1)
    compare(engine, graphs, 300, hybrid=True)
    # Sequences come and go, and other levels pay: a form anew every twenty steps or so, not at every step.
    assert graphs.num_captures <= 20


def test_graphs_captured_ahead_are_used_by_the_first_step() -> None:
    engine = Engine()
    graphs = DecodeGraphs(engine.attention, engine.model, [4, 32], max_tokens=1100)
    before = [cache.clone() for cache in engine.manager.get_memory_tensors()]
    graphs.capture(torch.zeros(1, 32, HEAD_DIM, device="cuda", dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(before, engine.manager.get_memory_tensors(), strict=True))
    compare(engine, graphs, 10, hybrid=False)
    assert (graphs.num_captures, graphs.num_eager, graphs.num_replays) == (2, 0, 10)


def test_blocks_without_work_read_nothing_that_nobody_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules lie in pinned memory that others have used before; flashinfer 0.6 lets such blocks read it."""
    monkeypatch.setattr("seqattn.attention.captured._one_row_each", lambda arguments: arguments)
    used = [torch.full((1 << n,), 1 << 29, dtype=torch.int32, pin_memory=True) for n in range(12, 20) for _ in range(4)]
    del used
    engine = Engine(num_sequences=64)
    graphs = DecodeGraphs(engine.attention, engine.model, [48, 64], max_tokens=1100)
    graphs.capture(torch.zeros(1, 32, HEAD_DIM, device="cuda", dtype=torch.bfloat16))
    assert [blocks_of(step)[0] for step in graphs._steps.values()] == [48 // 4 + 47, 64 // 4 + 63]
    compare(engine, graphs, 10, hybrid=False)
    assert graphs.num_replays == 10


@pytest.mark.parametrize(("num_sequences", "size"), [(48, 64), (64, 64), (20, 32)])
def test_a_graph_has_no_block_beside_those_for_sequences_and_parts(num_sequences: int, size: int) -> None:
    engine = Engine(num_sequences=num_sequences)
    graphs = DecodeGraphs(engine.attention, engine.model, [size], max_tokens=1100)
    graphs.capture(torch.zeros(1, 32, HEAD_DIM, device="cuda", dtype=torch.bfloat16))
    (step,) = graphs._steps.values()
    num_processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert blocks_of(step) == (max(size, 2 * num_processors // 8), True)
    compare(engine, graphs, 10, hybrid=False)
    assert (graphs.num_captures, graphs.num_replays) == (1, 10)


def test_batches_that_fit_no_graph_are_computed_without() -> None:
    engine = Engine()
    graphs = DecodeGraphs(engine.attention, engine.model, [8], max_tokens=1100, capture_after=1)
    compare(engine, graphs, 3, hybrid=False)
    other = Engine()
    short = DecodeGraphs(other.attention, other.model, [32], max_tokens=100, capture_after=1)
    compare(other, short, 3, hybrid=False)
    assert graphs.num_captures == short.num_captures == 0


def test_graphs_beyond_the_most_are_dropped() -> None:
    engine = Engine()
    sizes = (32, 48, 64)
    graphs = DecodeGraphs(engine.attention, engine.model, sizes, max_tokens=1100, max_graphs=2)
    graphs.capture(torch.zeros(1, 32, HEAD_DIM, device="cuda", dtype=torch.bfloat16))
    assert (graphs.num_captures, len(graphs._steps)) == (3, 2)


def test_a_step_that_is_refused_writes_nothing_and_the_next_is_right() -> None:
    engine, other = Engine(), Engine()
    graphs = DecodeGraphs(engine.attention, engine.model, [32], max_tokens=1100, capture_after=1)
    for number in range(6):
        for each in (engine, other):
            each.descriptor.allocate_decoding(each.ids)
        hidden = torch.randn(20, 32, HEAD_DIM, device="cuda").bfloat16()
        if number == 3:
            page = engine.descriptor.seq_id_to_data[engine.ids[0]].kv_page_indices[-1]
            engine.manager.ref([page])
            before = engine.manager.key_cache.clone()
            with pytest.raises(SharedPageError):
                graphs.replay(engine.data(hybrid=False), -hidden)  # type: ignore[arg-type]
            assert torch.equal(before, engine.manager.key_cache)
            engine.manager.unref([page])
        out, _ = graphs.replay(engine.data(hybrid=False), hidden)  # type: ignore[arg-type]
        assert relative_error(out, other.by_hand(hidden).float()) < 1e-2
    assert (graphs.num_captures, graphs.num_replays) == (1, 6)


def test_float16_is_captured_as_well() -> None:
    engine = Engine(dtype=torch.float16)
    graphs = DecodeGraphs(engine.attention, engine.model, [32], max_tokens=1100)
    compare(engine, graphs, 20, hybrid=True)
    assert graphs.num_captures >= 1
    assert graphs.num_replays >= 10
