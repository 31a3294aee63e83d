"""Lists that the last level would wait for, as groups of one sequence in levels above it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from seqattn import CacheDescriptor, CostModel, PageAllocator, cost, long_lists
from seqattn.attention.calls import Choice, work_of
from seqattn.attention.choice import choose
from seqattn.attention.plan import BatchPlan, plan_batch
from seqattn.cache import PagedKVCacheManager
from seqattn.device import Device, Groups
from seqattn.forest import Run, build_forest, depths_of
from seqattn.groups import groups_of
from seqattn.hybrid import pack_hybrid, pack_runs
from seqattn.levels import pages_above
from seqattn.load import LONG_GROUPS, Heads
from seqattn.long_lists import runs_to_keep, with_long_lists
from seqattn.packed import FlashInferHybridData
from tests.seqattn.packs import TINY, Asked, Packs
from tests.seqattn.test_calls import HEADS_EACH, NUM_KV_HEADS, check
from tests.seqattn.truth import Batch, batches, fill

PAGE_SIZE = 16
DEVICE = Device()
MODEL = CostModel.for_heads(32, 8, 128, 2, device=DEVICE)

Int64Array = npt.NDArray[np.int64]


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of a few tokens may be long."""
    monkeypatch.setattr(long_lists, "_LEAST", 1)


def alone(lens: list[int], **device: Any) -> list[Run]:  # noqa: ANN401  of `Device`
    """The long lists of sequences that share nothing."""
    tokens = np.array(lens)
    its = evolve(DEVICE, **device) if device else DEVICE
    return with_long_lists([], tokens, (tokens - 1) // PAGE_SIZE, PAGE_SIZE, its, Heads())


def test_the_picture() -> None:
    (run,) = alone([1000] * 63 + [20_000])
    assert (run.first, run.stop, run.parent) == (63, 64, None)
    assert (PAGE_SIZE * run.begin, PAGE_SIZE * run.end) == (0, 19_456)


@pytest.mark.parametrize(
    "lens",
    [[], [20_000], [1000] * 64, [1000] * 63 + [1400], [20] * 63 + [200], [900, 1100] * 128],
    ids=["none", "one", "alike", "one a little longer", "all short", "long and short in turn"],
)
def test_lists_that_nobody_waits_for_stay_where_they_are(lens: list[int]) -> None:
    assert alone(lens) == []


def test_few_lists_are_cut_by_the_kernel_itself() -> None:
    """Sixteen lists leave room for seventeen parts more."""
    assert alone([1000] * 15 + [20_000]) == []
    assert len(alone([1000] * 15 + [20_000], num_processors=60)) == 1, "there is none where few fill the device"


def test_there_are_no_more_than_may_still_be_cut() -> None:
    lens = [100] * 200 + [4000 + 100 * i for i in range(40)]
    runs = alone(lens)
    assert len(runs) == 31
    assert min(lens[run.first] for run in runs) >= sorted(lens)[-31]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("num_processors", [2, 16, 78, 108, 114, 132])
def test_padded_for_a_graph_long_lists_may_still_be_cut(num_processors: int, num_kv_heads: int) -> None:
    """The kernel cuts nothing where there are as many lists as there is room for."""
    device, room = evolve(DEVICE, num_processors=num_processors), 2 * num_processors // num_kv_heads
    found = []
    for num_long in range(1, 40):
        lens = np.array([300] * 600 + [9000] * num_long)
        limits = (lens - 1) // PAGE_SIZE
        its = with_long_lists([], lens, limits, PAGE_SIZE, device, Heads(4 * num_kv_heads, num_kv_heads, 128))
        found.append(len(its))
    assert all((num // LONG_GROUPS + 1) * LONG_GROUPS < room for num in found if num)
    assert max(found) <= 31


def test_never_all_sequences_are_long() -> None:
    runs = alone([3000] * 16 + [20_000], num_processors=60)
    assert [run.first for run in runs][-1] == 16
    assert 0 < len(runs) < 17


def test_a_run_stays_the_same_for_many_steps() -> None:
    """Of what is long all but a remainder is in the level: with every step one token more."""
    lens = np.array([1000] * 63 + [20_000])
    found = [tuple(alone((lens + step).tolist())) for step in range(1500)]
    assert len(set(found)) <= 3
    assert all(len(runs) == 1 for runs in found)


def test_a_long_list_of_a_group_stands_below_it() -> None:
    """Sixty sequences on a prompt, of which one has much of its own, and one that shares nothing and is long."""
    shared, own = list(range(512)), iter(range(512, 10**6))
    num_own = [20] * 59 + [900]
    tables = [np.array([*shared, *(next(own) for _ in range(n))], dtype=np.int32) for n in num_own]
    tables.append(np.array([next(own) for _ in range(1000)], dtype=np.int32))
    lens = np.array([PAGE_SIZE * len(table) for table in tables])
    order, forest = build_forest(tables, ((lens - 1) // PAGE_SIZE).tolist())
    assert order == list(range(61))
    runs = with_long_lists(forest, lens, (lens - 1) // PAGE_SIZE, PAGE_SIZE, DEVICE, Heads())
    assert runs[0] == forest[0]
    below, beside = runs[1:]
    assert (below.first, below.stop, below.begin, below.parent) == (59, 60, 512, 0)
    assert (beside.first, beside.stop, beside.begin, beside.parent) == (60, 61, 0, None)
    data = pack_hybrid(tables, lens, page_size=PAGE_SIZE, query_lens=None, cost_model=MODEL)
    assert any(np.diff(level.qo_indptr).tolist()[-1] == 1 for level in data.levels[:-1])


# -- which are chosen ----------------------------------------------------------------------------------------------


#: microseconds on an H200 (32 query heads, 8 KV heads of 128, bfloat16) of sequences that share nothing, whose lengths
#: are log-normal: plain attention, and the fastest with a level for long lists. Number, median, deviation of the log.
MEASURED = {
    (64, 2000, 1.0): (369.8, 185.6),
    (128, 1500, 1.0): (368.5, 266.9),
    (32, 4000, 1.2): (413.3, 189.1),
    (256, 800, 1.0): (422.0, 353.2),
    (64, 1000, 1.5): (478.1, 157.4),
}


def log_normal(count: int, median: float, deviation: float) -> Int64Array:
    rng = np.random.default_rng(5)
    pages = np.exp(rng.normal(np.log(median), deviation, count)) / PAGE_SIZE
    lens: Int64Array = np.maximum(1, pages.astype(np.int64)) * PAGE_SIZE
    return lens


def predicted_us(runs: list[Run], lens: Int64Array) -> float:
    groups = groups_of(runs, [True] * len(runs), np.arange(len(lens) + 1), lens, page_size=PAGE_SIZE)
    return DEVICE.step_us(groups, Heads())


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_a_level_for_long_lists_is_chosen_where_it_was_faster(shape: tuple[int, int, float]) -> None:
    lens, (plain, best) = log_normal(*shape), MEASURED[shape]
    assert predicted_us([], lens) == pytest.approx(plain, rel=0.25)
    runs = runs_to_keep([], np.arange(len(lens) + 1), lens, (lens - 1) // PAGE_SIZE, PAGE_SIZE, MODEL)
    assert set(depths_of(runs)) == {0}
    assert predicted_us(runs, lens) == pytest.approx(best, rel=0.3)


def test_where_it_does_not_pay_there_is_no_level() -> None:
    lens = np.array([1000] * 63 + [4000])
    model = CostModel.for_heads(32, 8, 128, 2, device=evolve(DEVICE, margin_us=50.0))
    assert model.device is not None
    assert with_long_lists([], lens, lens // PAGE_SIZE, PAGE_SIZE, model.device, Heads())
    assert runs_to_keep([], np.arange(65), lens, (lens - 1) // PAGE_SIZE, PAGE_SIZE, model) == []


def test_only_decoding_with_a_device_cuts_lists() -> None:
    lens = np.array([1000] * 63 + [20_000])
    limits = (lens - 4) // PAGE_SIZE
    for rows_each, model, num_cut in ((1, MODEL, 1), (1, CostModel(), 0), (1, None, 0), (4, MODEL, 0)):
        assert len(runs_to_keep([], rows_each * np.arange(65), lens, limits, PAGE_SIZE, model)) == num_cut


# -- what is packed and computed -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_length")
@given(batches(max_sequences=8, max_pages=9))
def test_a_forest_with_long_lists_is_a_forest(batch: Batch) -> None:
    batch = batch._replace(query_lens=[1] * len(batch.tables))
    order, forest = build_forest(batch.tables, batch.limits)
    lens, limits = (np.array(numbers, dtype=np.int64)[order] for numbers in (batch.num_tokens, batch.limits))
    runs = with_long_lists(forest, lens, limits, batch.page_size, TINY, Heads())
    assert [run[:4] for run in runs if run.stop - run.first > 1] == [run[:4] for run in forest]
    above = pages_above(forest, len(lens))
    for i, (first, stop, begin, end, parent) in enumerate(runs):
        around = [j for j, r in enumerate(runs) if j != i and r.first <= first and stop <= r.stop]
        assert parent == max(around, key=depths_of(runs).__getitem__, default=None)
        assert begin == (0 if parent is None else runs[parent].end) < end
        if stop == first + 1:
            assert begin == above[first]
            assert end <= limits[first]
    assert sum(run.stop - run.first == 1 for run in runs) <= 3, "there is room for six"


@pytest.mark.usefixtures("any_length")
@given(batches(max_sequences=8, max_pages=9), st.sampled_from([24, 40, 132]), st.data())
def test_levels_of_long_lists_are_dense_attention(batch: Batch, num_processors: int, data: st.DataObject) -> None:
    batch = batch._replace(query_lens=[1] * len(batch.tables))
    order, forest = build_forest(batch.tables, batch.limits)
    lens, limits = (np.array(numbers, dtype=np.int64)[order] for numbers in (batch.num_tokens, batch.limits))
    device = evolve(TINY, num_processors=num_processors)
    runs = with_long_lists(forest, lens, limits, batch.page_size, device, Heads())
    num_pages = 1 + max(int(table.max()) for table in batch.tables)
    manager = PagedKVCacheManager(num_pages, batch.page_size, NUM_KV_HEADS, 4, torch.float32, "cpu")
    fill(manager, batch, 0)
    tokens, rows = np.array(batch.num_tokens), np.ones(len(order), dtype=np.int64)
    packed = pack_runs(batch.tables, tokens, rows, (order, runs), None, page_size=batch.page_size)
    plan = plan_batch(manager, packed, None, causal=True)
    ways = [Choice("fa2"), Choice("fa3", 1), Choice("fa3", 3)]
    choices = [data.draw(st.sampled_from([*ways, *[Choice("decode")] * has_one_each(level)])) for level in plan.levels]
    check(plan, [*choices[:-1], Choice("decode")], manager, batch, True)


def has_one_each(level: Any) -> bool:  # noqa: ANN401  of a plan
    used = level.page_lens > 0
    return bool(used.any() and level.row_lens[used].max() == 1)


def plan_of(data: FlashInferHybridData, num_pages: int) -> BatchPlan:
    manager = PagedKVCacheManager(num_pages, PAGE_SIZE, NUM_KV_HEADS, 4, torch.float32, "cpu")
    return plan_batch(manager, data, None, causal=True)


def test_lists_of_one_row_each_are_read_by_the_decode_kernel() -> None:
    """It is faster to plan than fa2, whose plan for a graph would take its largest tiles."""
    lens = np.array([64] * 20 + [4096] * 3)
    tables = np.split(np.arange(lens.sum() // PAGE_SIZE, dtype=np.int32), np.cumsum(lens // PAGE_SIZE)[:-1])
    runs = [Run(i, i + 1, 0, 192, None) for i in (20, 21, 22)]
    ones = np.ones_like(lens)
    data = pack_runs(tables, lens, ones, (list(range(23)), runs), None, page_size=PAGE_SIZE)
    plan = plan_of(data, int(lens.sum()) // PAGE_SIZE)
    seen: list[Groups] = []

    def slices_of(shared: Any, _: Groups) -> list[int]:  # noqa: ANN401  levels
        seen.extend(shared)
        return [0]

    choices = choose(plan, slices_of, PAGE_SIZE, has_fa3=True)
    assert [choice.kernel for choice in choices] == ["decode", "decode"]
    assert seen[0].tokens.tolist() == [3072] * 3
    top, last = work_of(plan, choices, HEADS_EACH, PAGE_SIZE).calls
    assert top.first_query == 0
    assert (top.grows, last.grows) == (False, True)
    assert np.diff(last.kv_page_indptr).tolist() == [4] * 20 + [64] * 3


def test_a_level_that_has_all_sequences_is_not_the_last_one() -> None:
    tables = np.split(np.arange(120, dtype=np.int32), 4)
    lens, runs = np.full(4, 480), [Run(i, i + 1, 0, 20, None) for i in range(4)]
    data = pack_runs(tables, lens, np.ones_like(lens), (list(range(4)), runs), None, page_size=PAGE_SIZE)
    top, last = work_of(plan_of(data, 120), [Choice("decode")] * 2, HEADS_EACH, PAGE_SIZE).calls
    assert (top.first_query, last.first_query) == (None, None)
    assert (top.grows, last.grows) == (False, True)


def long_conversations() -> tuple[Packs, CacheDescriptor, list[int]]:
    """Sixty-one short ones, and of three that are long all but some pages in a level, once they are packed."""
    descriptor = CacheDescriptor(PageAllocator(8000, PAGE_SIZE))
    ids = list(range(64))
    descriptor.allocate(ids, [1000] * 61 + [9000, 12_000, 20_000])
    packs = Packs(descriptor)
    assert len(packs.pack(ids, Asked(model=MODEL)).levels) == 2
    return packs, descriptor, ids


@pytest.mark.parametrize("num_tokens", [11_999, 11_265, 11_264, 11_263, 11_200, 11_000, 700, 1])
def test_fewer_tokens_than_the_level_has_are_packed_anew(num_tokens: int) -> None:
    packs, _, ids = long_conversations()
    asked = [1000] * 61 + [9000, num_tokens, 20_000]
    for _ in range(2):
        packs.pack(ids, Asked(num_tokens=asked, model=MODEL))
        packs.pack(ids, Asked(model=MODEL))


def test_other_lengths_with_the_same_mean_and_longest_are_packed_anew() -> None:
    packs, _, ids = long_conversations()
    for each in (9000, 11_000), (8000, 12_000), (8500, 11_500), (9000, 11_000):
        packs.pack(ids, Asked(num_tokens=[1000] * 61 + [*each, 20_000], model=MODEL))


def test_what_was_chosen_holds_for_about_as_many_long_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """When one joins or leaves, the device is asked again only if there are other lists now."""
    asked: list[int] = []
    fastest: Any = cost._fastest

    def counted(runs: list[Run], *arguments: Any) -> list[bool]:  # noqa: ANN401  as `_fastest`
        asked.append(len(runs))
        kept: list[bool] = fastest(runs, *arguments)
        return kept

    monkeypatch.setattr(cost, "_fastest", counted)
    model = CostModel.for_heads(32, 8, 128, 2, device=evolve(DEVICE))
    shared = [Run(0, 30, 0, 8, None)]

    def chosen(*long: int) -> list[Run]:
        lens = np.array([400] * 50 + list(long))
        limits = (lens - 1) // PAGE_SIZE
        return runs_to_keep(shared, np.arange(len(lens) + 1), lens, limits, PAGE_SIZE, model)

    first = chosen(20_000, 17_000, 16_000)
    assert {run.stop - run.first for run in first} >= {1}
    assert asked == [4]
    assert [run[:4] for run in chosen(20_000, 16_000, 17_000) if run.stop - run.first > 1] == [
        run[:4] for run in first if run.stop - run.first > 1
    ]
    assert asked == [4], "the same lengths, in another order"
    assert len(chosen(20_000, 17_500, 15_000)) == len(first)
    assert asked == [4]
    chosen(20_000, 1000, 1000)
    assert len(asked) == 2


@pytest.mark.usefixtures("any_length")
def test_what_is_remembered_is_what_was_chosen() -> None:
    """A run of one sequence below one that is dropped costs the same kept or dropped, but for rounding."""
    num_kept = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(2, 7, int(rng.integers(1, 4))).tolist()
        ends = np.cumsum(sizes).tolist()
        shared = [
            Run(stop - size, stop, 0, int(rng.integers(1, 30)), None) for size, stop in zip(sizes, ends, strict=True)
        ]
        begins = pages_above(shared, ends[-1])
        lens = PAGE_SIZE * begins + rng.lognormal(5.0, 1.5, ends[-1]).astype(np.int64) + 1
        its = np.arange(len(lens) + 1), lens, (lens - 1) // PAGE_SIZE
        model = CostModel.for_heads(32, 8, 128, 2, device=evolve(TINY))
        first, again = (runs_to_keep(shared, *its, PAGE_SIZE, model) for _ in range(2))
        assert again == first
        num_kept += any(run.stop - run.first == 1 for run in first)
    assert num_kept > 100


def test_a_batch_that_decodes_keeps_its_level_for_long_lists() -> None:
    packs, descriptor, ids = long_conversations()
    levels = []
    for _ in range(200):
        levels.append(packs.pack(ids, Asked(model=MODEL)).levels)
        descriptor.allocate_decoding(ids)
    assert all(len(found) == 2 for found in levels)
    tops = [found[0] for found in levels]
    assert sum(a is b for a, b in zip(tops[1:], tops[:-1], strict=True)) > 190
    descriptor.release([61, 62, 63])
    assert len(packs.pack(ids[:61], Asked(model=MODEL)).levels) == 1
