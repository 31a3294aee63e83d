"""Long lists in levels of their own on the GPU: eager and replayed, against float32 and against plain attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from seqattn import CacheDescriptor, DecodeGraphs, PagedAttention, PagedKVCacheManager
from seqattn.attention.calls import Choice
from seqattn.attention.plan import plan_batch
from seqattn.device import Device
from seqattn.forest import build_forest
from seqattn.hybrid import pack_runs
from seqattn.load import Heads
from seqattn.long_lists import with_long_lists
from tests.gpu.batches import MOST_ERROR, Case, fill, relative_error
from tests.gpu.test_decode_graphs import HEAD_DIM, Engine, compare
from tests.gpu.test_flashinfer_backend import check
from tests.gpu.test_layer_graphs import ByLayer
from tests.seqattn.truth import Batch, batch_of

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

WAYS = {"decode": Choice("decode"), "fa2": Choice("fa2"), "fa3": Choice("fa3"), "fa3 in slices": Choice("fa3", 3)}
LONG = 5000


def unequal(seed: int) -> Batch:
    """Half of the sequences on one prompt; of both halves some have much of their own."""
    rng = np.random.default_rng(seed)
    fresh = iter(rng.permutation(4000).tolist())
    prompt = [next(fresh) for _ in range(30)]
    num_own = [int(n) for n in rng.integers(1, 8, 40)]
    for i in (3, 17, 25, 38):
        num_own[i] = int(rng.integers(150, 300))
    tables = [prompt * (i % 2) + [next(fresh) for _ in range(n)] for i, n in enumerate(num_own)]
    return batch_of(tables, [int(n) for n in rng.integers(1, 17, 40)], 16, [1] * 40)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [(32, 8), (8, 1), (32, 32)], ids=str)
def test_every_way_to_compute_long_lists_is_right(heads: tuple[int, int], way: str) -> None:
    for seed in range(2):
        batch = unequal(seed)
        case = Case(*heads, 128, 16, torch.bfloat16)
        manager = case.manager(batch)
        generator = fill(manager, seed)
        order, forest = build_forest(batch.tables, batch.limits)
        lens, limits = np.array(batch.num_tokens)[order], np.array(batch.limits)[order]
        full = evolve(Device(), num_processors=40 * heads[1] // 8, level_us=0.0)
        runs = with_long_lists(forest, lens, limits, 16, full, Heads(*heads, 128))
        assert sum(run.stop - run.first == 1 for run in runs) == 4
        rows = np.ones(len(order), dtype=np.int64)
        data = pack_runs(batch.tables, np.array(batch.num_tokens), rows, (order, runs), None, page_size=16)
        attention = PagedAttention(manager, heads[0])
        attention.plan(data)
        check(attention, batch, generator)
        plan = plan_batch(manager, data, None, causal=True)
        choices = [Choice("fa2") if way == "decode" else WAYS[way], WAYS[way], Choice("decode")]
        assert len(plan.levels) == 3
        attention._prepared = attention._impl.prepare(plan, choices)  # type: ignore[call-arg]
        check(attention, batch, generator)


def test_the_planner_cuts_long_lists_and_plans_their_level_once() -> None:
    lens = [700 + 13 * i for i in range(60)] + [9000, 14_000, 20_000, 26_000]
    manager = PagedKVCacheManager(9000, 16, 8, 128, torch.bfloat16, "cuda")
    generator, descriptor = fill(manager, 0), CacheDescriptor(manager)
    ids = list(range(len(lens)))
    descriptor.allocate(ids, lens)
    attention = PagedAttention(manager, 32)
    tops: list[Any] = []
    for _ in range(12):
        attention.plan(descriptor.pack_hybrid_for_flashinfer(ids, cost_model=attention.cost_model))
        top, last = attention._prepared.work.calls
        assert last.grows
        tops.append(top)
        tables, num_tokens = descriptor.tables(ids)
        batch = Batch(16, [np.array(table) for table in tables], num_tokens.tolist(), [1] * len(ids))
        check(attention, batch, generator)
        descriptor.allocate_decoding(ids)
    assert all(top is tops[0] for top in tops)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_graphs_are_replayed_with_long_lists(layout: str, by_layer: bool) -> None:
    engine = Engine(layout=layout, num_sequences=40, long=LONG)
    assert cuts(engine)
    graphs = graphs_of(engine, by_layer=by_layer)
    compare(engine, graphs, 60, hybrid=True)
    counts = graphs.graphs if by_layer else graphs
    assert counts.num_replays >= 40
    assert counts.num_captures <= 4


@pytest.mark.parametrize("by_layer", [False, True])
def test_batches_that_take_turns_in_one_graph_have_their_own_long_lists(by_layer: bool) -> None:
    engine, other = (Engine(num_sequences=72, long=LONG) for _ in range(2))
    graphs = graphs_of(engine, by_layer=by_layer)
    halves = [engine.ids[:40], engine.ids[32:]]
    for number in range(12):
        engine.ids = other.ids = halves[number // 2 % 2]
        for each in (engine, other):
            each.descriptor.allocate_decoding(each.ids)
        assert cuts(engine)
        hidden = torch.randn(40, 32, HEAD_DIM, device="cuda", generator=engine.generator).bfloat16()
        out, _ = graphs.replay(engine.data(hybrid=True), hidden)
        assert relative_error(out, other.by_hand(hidden).float()) < MOST_ERROR[torch.bfloat16]
    counts = graphs.graphs if by_layer else graphs
    assert counts.num_replays >= 10
    assert counts.num_captures == 1


def graphs_of(engine: Engine, *, by_layer: bool) -> Any:  # noqa: ANN401  either kind
    most = 700 + LONG + 200
    return (
        ByLayer(engine, [48], most) if by_layer else DecodeGraphs(engine.attention, engine.model, [48], max_tokens=most)
    )


def cuts(engine: Engine) -> bool:
    """Whether a level above the last has groups of one row each."""
    levels = engine.data(hybrid=True).levels[:-1]  # type: ignore[attr-defined]
    sizes = [level.qo_indptr.diff()[level.kv_page_indptr.diff() > 0] for level in levels]
    return any(int(its.max()) == 1 for its in sizes)
