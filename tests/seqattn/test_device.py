"""What a device's kernels cost: counted by hand, and the groups that are counted against packed levels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from seqattn.cost import CostModel, runs_that_pay
from seqattn.device import Device, Groups, Heads, KernelCost
from seqattn.errors import BadValueError
from seqattn.fit import Measured, device_with, logs_of, predict
from seqattn.forest import build_forest
from seqattn.groups import groups_of
from seqattn.hybrid import pack_runs
from seqattn.load import SLICES, Cut, is_short, loads_of
from tests.seqattn.truth import Batch, batches

HEADS = Heads()
#: a kernel whose reading and starts cost next to nothing
PURE = KernelCost(0.0, 1000.0, 1e20, 1e20, 0.0, 0.0, 8.0)


def groups(*sizes: tuple[int, int]) -> Groups:
    rows, tokens = (np.array(column, dtype=np.int64) for column in zip(*sizes, strict=True))
    return Groups(rows, tokens, int(tokens.sum()))


def load(levels: list[Groups], slices: int = 1) -> dict[str, list[float]]:
    """Blocks, mean tokens and the longest of each call: fa2 (or decode), or fa3 in these slices."""
    found, _ = loads_of(Cut.of(levels), HEADS, 132, np.array([slices]))
    blocks, tokens, longest, parts = found.values[:4]
    way = int(slices > 0)
    names = ("blocks", "mean", "longest", "parts")
    return {n: v[:, way].tolist() for n, v in zip(names, (blocks, tokens / blocks, longest, parts), strict=True)}


OWN = groups(*[(1, 16)] * 64)


def test_slices_make_blocks() -> None:
    """64 rows of 4 heads are 2 tiles for each of 8 KV heads: 16 blocks, of which 8 slices fill 132 multiprocessors."""
    for slices in (1, 2, 8):
        found = load([groups((64, 32768)), OWN], slices)
        assert (found["blocks"][0], found["longest"][0]) == (16 * slices, 32768 / slices)


def test_slices_that_fill_the_multiprocessors_are_best() -> None:
    kernels = {"fa3": PURE, "fa2_128": evolve(PURE, token_ns=1e6), "decode": PURE, "short": PURE}
    device = Device(**kernels, plain_us=0.0, start_us=0.0, level_us=0.0, gather_us=0.0, result_ns=0.0, gathered_ns=0.0)  # type: ignore[arg-type]
    us, slices = device.best([groups((64, 32768))], HEADS, OWN)
    assert slices == [8]
    assert us == pytest.approx(4096, rel=0.05)


def test_a_short_list_is_not_sliced() -> None:
    _, makes_sense = loads_of(Cut.of([groups((64, 100)), OWN]), HEADS, 132, SLICES)
    assert makes_sense[0].tolist() == [True, True] + [False] * (len(SLICES) - 1)
    assert makes_sense[1].tolist() == [True] + [False] * len(SLICES), "nor is a last level"


def test_lists_are_cut_until_blocks_fill_the_device() -> None:
    """Two blocks a multiprocessor make room for 33 tiles of each of 8 KV heads; no chunk is below 128 tokens."""
    level = load([groups((1, 8192), (1, 8192), (1, 8192), (1, 8192))], 0)
    assert level["longest"] == [1024]
    assert level["blocks"] == [4 * 8 * 8]
    assert level["parts"] == [4 * 8]
    assert load([groups((1, 150))], 0)["blocks"] == [2 * 8]
    assert load([groups(*[(1, 8192)] * 40)], 0)["parts"] == [0], "more tiles than there is room for are not cut"


def test_the_smallest_tile_that_the_mean_fits_is_taken() -> None:
    """4 heads each: 4 rows are 16 packed rows, 5 rows 20, 17 rows 68."""
    found = [loads_of(Cut.of([groups((rows, 256))]), HEADS, 132, SLICES)[0].kernel[0, 0] for rows in (4, 5, 16, 17)]
    assert found == [0, 1, 1, 2]


def test_short_lists_of_single_rows_have_a_kernel_of_their_own() -> None:
    def kind(num_lists: int, longest: int, mean: int, heads: Heads = HEADS) -> bool:
        return is_short(heads, 132, num_lists, longest, num_lists * mean)

    assert [kind(16, n, n) for n in (16, 80, 96)] == [True, True, False], "blocks do not fill the device"
    assert [kind(64, n, n // 2) for n in (16, 128, 144)] == [True, True, False], "longer lists would be cut"
    assert [kind(83, n, n) for n in (144, 176, 192)] == [True, True, False], "there are blocks enough"
    assert kind(128, 160, 128)
    assert not kind(128, 161, 128), "the others wait for the longest"
    assert not kind(7, 16, 16), "too few for a device"
    assert not kind(64, 16, 16, Heads(64, 8)), "not measured"
    assert not kind(64, 16, 16, Heads(32, 8, 64)), "likewise"
    assert not kind(64, 144, 144, Heads(32, 8))
    assert kind(166, 144, 144, Heads(16, 4)), "half the KV heads take twice the lists"
    assert not kind(165, 144, 144, Heads(16, 4))
    for rows, tokens, kernel in ((1, 80, 4), (1, 96, 0), (2, 16, 0)):
        lists = [groups(*[(rows, tokens)] * 16)]
        assert loads_of(Cut.of(lists), HEADS, 132, SLICES)[0].kernel[0, 0] == kernel
        assert loads_of(Cut.of(lists), HEADS, 132, SLICES, has_short=False)[0].kernel[0, 0] == 0


def test_tokens_that_are_read_again_cost_less() -> None:
    once, twice = groups((1, 4096), (1, 4096)), Groups(np.array([1, 1]), np.array([4096, 4096]), 4096)
    assert Device().step_us([twice], HEADS) < Device().step_us([once], HEADS)


def test_tokens_in_line_have_a_kernel_of_their_own_where_slices_are_long() -> None:
    line = evolve(groups((64, 4096)), in_line=True)
    found, _ = loads_of(Cut.of([line, groups((64, 4096)), OWN]), HEADS, 132, SLICES)
    assert found.kernel[0, 1:].tolist() == [5 if 4096 // n >= 512 else 3 for n in SLICES.tolist()]
    assert found.kernel[1, 1:].tolist() == [3] * len(SLICES)
    device = evolve(Device(), fa3_in_line=evolve(Device().fa3_in_line, token_ns=1.0))
    top = groups((256, 32768))
    assert device.best([evolve(top, in_line=True)], HEADS, OWN)[0] < 0.6 * device.best([top], HEADS, OWN)[0]


def test_without_fa3_every_shared_level_is_fa2() -> None:
    device = Device(has_fa3=False)
    assert device.best([groups((256, 8192)), groups((8, 512), (8, 512))], HEADS)[1] == [0, 0]
    assert device.best([], HEADS) == (0.0, [])


def test_many_choices_at_once_are_each_alone() -> None:
    device, own = Device(), groups(*[(1, 512)] * 128)
    two, four = groups(*[(64, 4096)] * 2), groups(*[(32, 512)] * 4)
    levels = [[own], [two, own], [two, four, own], [two, four, four, own]]
    shared = [level for choice in levels for level in choice[:-1]]
    cut = evolve(Cut.of([*shared, *[choice[-1] for choice in levels]]), num_shared=len(shared))
    together = device.ways(cut, [len(choice) - 1 for choice in levels], HEADS)
    for choice, (us, slices) in zip(levels, together, strict=True):
        assert us == pytest.approx(device.step_us(choice, HEADS))
        assert len(slices) == len(choice) - 1


@pytest.mark.parametrize("count", [1, 2])
def test_no_way_to_compute_levels_is_predicted_to_be_faster(count: int) -> None:
    device, own = Device(), groups(*[(1, 512)] * 128)
    shared = [groups(*[(64, 9000)] * 2), groups(*[(32, 700), (32, 500)] * 2)][:count]
    us, slices = device.best(shared, HEADS, own)
    ways = itertools.product([0, 1, 2, 3, 4, 6, 8], repeat=count)  # more would make slices too short
    every = [Measured(0, [*shared, own], way, 1.0) for way in ways]
    predicted = predict(every, HEADS, device)
    assert us <= predicted.min() * (1 + 1e-9)
    assert us == pytest.approx(predict([Measured(0, [*shared, own], slices, 1.0)], HEADS, device)[0])


def test_calls_that_fill_a_part_of_the_device_share_it() -> None:
    """A first level in 64 of 132 multiprocessors takes less than its own time beside a last level."""
    device, own = Device(), groups(*[(1, 512)] * 256)
    top = [groups((256, 8192))]
    (beside,) = predict([Measured(0, [*top, own], [1], 1.0)], HEADS, device)
    (alone,) = predict([Measured(0, [own], [], 1.0)], HEADS, device)
    tiny = groups(*[(1, 16)] * 256)
    (first,) = predict([Measured(0, [*top, tiny], [1], 1.0)], HEADS, device)
    assert max(alone, first) < beside < 0.85 * (alone + first)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1"])
def test_a_rate_that_makes_no_sense_is_refused(value: float) -> None:
    with pytest.raises(BadValueError, match="bytes_per_s"):
        KernelCost(0.0, 1.0, value, 1.0, 0.0)


@given(batches(), st.randoms())
def test_groups_are_those_of_the_packed_levels(batch: Batch, random: object) -> None:
    """Rows, tokens and different pages of every level, for any choice of runs."""
    lens, rows = np.array(batch.num_tokens), np.array(batch.query_lens)
    forest = build_forest(batch.tables, batch.limits)
    kept = [random.random() < 0.6 for _ in forest[1]]  # type: ignore[attr-defined]
    data = pack_runs(batch.tables, lens, rows, forest, kept, page_size=batch.page_size)
    order = forest[0]
    before = np.concatenate(([0], np.cumsum(rows[order])))
    found = groups_of(forest[1], kept, before, lens[order], page_size=batch.page_size)
    assert len(found) == len(data.levels)
    for level, group in zip(data.levels, found, strict=True):
        num_pages = np.diff(level.kv_page_indptr.numpy())
        used = num_pages > 0
        pairs = zip(np.diff(level.qo_indptr.numpy())[used], num_pages[used], strict=True)
        mine = zip(group.rows, -(-group.tokens // batch.page_size), strict=True)
        assert sorted(mine) == sorted(pairs)
    for level, group in zip(data.levels[:-1], found[:-1], strict=True):
        assert group.num_different == batch.page_size * len(np.unique(level.kv_page_indices.numpy()))


def test_nothing_is_shared_unless_it_is_predicted_to_pay() -> None:
    """Eight sequences of 64 shared tokens, and 256 of 8192."""
    for batch, shared, pays in ((8, 64, False), (256, 8192, True)):
        assert plan_of(CostModel.for_heads(32, 8, 128, 2, device=Device()), batch, shared, 16) == [pays]


def plan_of(model: CostModel, batch: int, shared: int, own: int) -> list[bool]:
    tables = [np.array([*range(shared // 16), 10_000 + i], dtype=np.int32) for i in range(batch)]
    order, runs = build_forest(tables, [shared // 16] * batch)
    assert order == list(range(batch))
    return runs_that_pay(runs, np.arange(batch + 1), np.full(batch, shared + own), 16, model)


def test_a_choice_holds_for_a_few_steps_of_decoding() -> None:
    device = Device()
    model = CostModel.for_heads(32, 8, 128, 2, device=device)
    for own in (1, 9, 15):
        assert plan_of(model, 256, 8192, own) == [True]
    assert len(device.chosen) == 1, "the same batch a few tokens later is not thought about again"
    plan_of(model, 256, 8192, 600)
    assert len(device.chosen) == 2
    plan_of(model, 255, 8192, 600)
    assert len(device.chosen) == 3
    for batch in (260, 271):
        plan_of(model, batch, 8192, 1)
    assert len(device.chosen) == 3, "nor is one that some sequences have joined"
    plan_of(model, 288, 8192, 1)
    assert len(device.chosen) == 4


def step_us_of(device: Device, top: list[int], *, kernel: int) -> float:
    """A step of one shared level of groups of 32 rows with so many tokens, by fa3 in so many slices or by fa2."""
    own = groups(*[(1, 64)] * 128)
    level = groups(*[(32, tokens) for tokens in top])
    return float(predict([Measured(0, [level, own], [kernel], 1.0)], HEADS, device)[0])


def test_short_lists_fill_up_what_a_last_round_of_equal_ones_leaves() -> None:
    """Seventeen groups of eight KV heads are four blocks more than there are multiprocessors."""
    device = Device()
    fits, equal = step_us_of(device, [8192] * 16, kernel=1), step_us_of(device, [8192] * 17, kernel=1)
    assert equal > 1.5 * fits, "two rounds"
    unequal = step_us_of(device, [8192] + [4096] * 16, kernel=1)
    assert unequal < 1.1 * step_us_of(device, [8192] + [4096] * 15, kernel=1)


def test_a_list_that_outlasts_the_others_is_waited_for() -> None:
    device, short = Device(), [(1, 256)] * 31
    none, one = groups(*[(1, 256)] * 32), groups(*short, (1, 16384))
    alone = device.step_us([one], HEADS) - device.step_us([none], HEADS)
    assert alone > 16000 * device.decode.token_ns / 1e3, "no faster than a block computes"
    top = groups((32, 8192))
    beside = device.step_us([top, one], HEADS)
    assert beside > 2 * 16384 * device.decode.token_ns / 1e3, "two blocks share a multiprocessor"


def test_own_tokens_count_where_the_longest_sequence_is_the_same() -> None:
    device = Device()
    model = CostModel.for_heads(32, 8, 128, 2, device=device)
    tables = [np.array([*range(512), 10_000 + i], dtype=np.int32) for i in range(64)]
    _, runs = build_forest(tables, [512] * 64)
    for own in (16, 3000):
        lens = np.array([8192 + own] * 63 + [8192 + 4000])
        runs_that_pay(runs, np.arange(65), lens, 16, model)
    assert len(device.chosen) == 2


def test_batches_of_several_rows_are_remembered_too() -> None:
    """Rows that differ a little from step to step, as those of speculative decoding, come to the same."""
    device = Device()
    model = CostModel.for_heads(32, 8, 128, 2, device=device)
    tables = [np.array([*range(512), 10_000 + i], dtype=np.int32) for i in range(64)]
    _, runs = build_forest(tables, [512] * 64)
    for shift, count in ((0, 1), (1, 1), (9, 1), (None, 2)):
        rows = np.full(64, 9) if shift is None else np.roll(np.arange(64) % 4 + 1, shift)
        runs_that_pay(runs, np.concatenate(([0], np.cumsum(rows))), np.full(64, 8250), 16, model)
        assert len(device.chosen) == count


def test_a_share_is_at_most_one() -> None:
    with pytest.raises(BadValueError, match=r"spread must be a share, from 0 to 1, not 1\.5"):
        Device(spread=1.5)
    assert device_with(Device(), logs_of(Device()) + 5).spread == 1.0
