"""What a device's kernels cost: counted by hand, and the groups that are counted against packed levels."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from seqattn.cost import CostModel, runs_that_pay
from seqattn.device import Device, Groups, Heads, KernelCost
from seqattn.errors import BadValueError
from seqattn.forest import build_forest
from seqattn.groups import groups_of
from seqattn.hybrid import pack_runs
from tests.seqattn.truth import Batch, batches

HEADS = Heads()
#: a device whose reading and starts cost next to nothing
PURE = KernelCost(0.0, 1000.0, 1e20, 1e20, 0.0)


def groups(*sizes: tuple[int, int]) -> Groups:
    rows, tokens = (np.array(column, dtype=np.int64) for column in zip(*sizes, strict=True))
    return Groups(rows, tokens, int(tokens.sum()))


def test_slices_fill_the_multiprocessors() -> None:
    """64 rows of 4 heads are 2 tiles for each of 8 KV heads: 16 blocks, of which 8 slices fill 132 multiprocessors."""
    device = Device(fa3=PURE, fa2_128=evolve(PURE, token_ns=1e6), slice_us=0.0)
    costs = {cost.slices: cost for cost in device.fa3_costs(groups((64, 32768)), HEADS)}
    assert [round(costs[n].us) for n in (1, 2, 4, 8)] == [32768, 16384, 8192, 4096]
    assert costs[8].fill == pytest.approx(128 / 132)
    assert costs[16].us == pytest.approx(2 * 2048), "256 blocks take two waves"
    assert device.best([groups((64, 32768))], HEADS)[1] == [8]


def test_a_short_list_is_not_sliced() -> None:
    assert [cost.slices for cost in Device().fa3_costs(groups((64, 100)), HEADS)] == [1]


def test_the_smallest_tile_that_the_mean_fits_is_taken() -> None:
    """4 heads each: 4 rows are 16 packed rows, 5 rows 20, 17 rows 68."""
    kernels = {"decode": evolve(PURE, wave_us=1.0), "fa2_64": evolve(PURE, wave_us=2.0), "fa2_128": PURE}
    device = Device(**{name: evolve(cost, token_ns=0.0) for name, cost in kernels.items()})  # type: ignore[arg-type]
    found = [device.fa2_cost(groups((rows, 128)), HEADS).us for rows in (4, 5, 16, 17)]
    assert found == pytest.approx([1.0, 2.0, 2.0, 0.0], abs=1e-6)


def test_tokens_that_are_read_again_cost_less() -> None:
    once, twice = groups((1, 4096), (1, 4096)), Groups(np.array([1, 1]), np.array([4096, 4096]), 4096)
    assert Device().fa2_cost(twice, HEADS).us < Device().fa2_cost(once, HEADS).us


def test_without_fa3_every_shared_level_is_fa2() -> None:
    device = Device(has_fa3=False)
    assert device.best([groups((256, 8192)), groups((8, 512), (8, 512))], HEADS)[1] == [0, 0]


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
    model = CostModel.for_heads(32, 8, 128, 2)
    for batch, shared, pays in ((8, 64, False), (256, 8192, True)):
        tables = [np.array([*range(shared // 16), 10_000 + i], dtype=np.int32) for i in range(batch)]
        lens = np.full(batch, shared + 16)
        order, runs = build_forest(tables, [shared // 16] * batch)
        assert order == list(range(batch))
        assert runs_that_pay(runs, np.arange(batch + 1), lens, 16, model) == [pays]
