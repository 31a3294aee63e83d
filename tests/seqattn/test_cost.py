"""The cost model: near the measured times, and the best choice of all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from seqattn.cost import CostModel, runs_that_pay
from seqattn.errors import BadValueError
from seqattn.hybrid import check_hybrid, pack_hybrid
from seqattn.packed import FlashInferHybridData, HybridLevel
from tests.seqattn.predicted import predict_us
from tests.seqattn.truth import (
    FOREST,
    Batch,
    SlowLevel,
    SlowRun,
    batch_of,
    batches,
    slow_levels,
    slow_order,
    slow_runs,
)


def grid(systems: int, system_len: int, documents: int, document_len: int, own_len: int, batch: int) -> Batch:
    """`systems` prompts, each with `documents`, each asked by as many sequences as fill the batch; pages of 16."""
    pages = iter(range(10**9))
    tables = []
    for _ in range(systems):
        system = [next(pages) for _ in range(system_len // 16)]
        for _ in range(documents):
            prompt = system + [next(pages) for _ in range(document_len // 16)]
            each = batch // (systems * documents)
            tables += [prompt + [next(pages) for _ in range(own_len // 16)] for _ in range(each)]
    return batch_of(tables, [16] * len(tables), 16, [1] * len(tables))


def packed(batch: Batch, model: CostModel | None) -> FlashInferHybridData:
    return pack_hybrid(
        batch.tables, batch.num_tokens, page_size=batch.page_size, query_lens=batch.query_lens, cost_model=model
    )


#: (batch, shared, own tokens), µs of plain decode and of two levels; H200, flashinfer 0.7.2, bfloat16
MEASURED = [
    ((256, 8192, 512), 1068, 273),
    ((256, 32768, 256), 3772, 537),
    ((64, 32768, 1024), 1013, 206),
    ((64, 8192, 512), 280, 97),
    ((64, 512, 2048), 150, 154),
    ((16, 1024, 256), 25, 29),
    ((8, 2048, 2048), 35, 47),
]

#: the arguments of `grid`, µs of plain decode, of all three levels, and of two (documents left to the last level)
MEASURED_FORESTS = [
    ((2, 8192, 8, 8192, 512, 128), 967, 317, 606),
    ((1, 16384, 32, 2048, 128, 256), 2050, 383, 528),
    ((4, 2048, 4, 4096, 256, 128), 387, 188, 317),
    ((8, 4096, 4, 256, 1024, 256), 711, 393, 390),
    ((1, 1024, 16, 512, 512, 128), 165, 152, 145),
]

PLAIN = CostModel(level_overhead_us=1e9)


@pytest.mark.parametrize(("shape", "plain_us", "levels_us"), MEASURED)
def test_the_model_is_near_what_was_measured(shape: tuple[int, int, int], plain_us: float, levels_us: float) -> None:
    size, shared, own = shape
    batch = grid(1, shared, 1, 0, own, size)
    overhead = 10  # µs: what small batches lose to effects that the model does not have
    assert predict_us(packed(batch, PLAIN), 16, CostModel()) == pytest.approx(plain_us, rel=0.1, abs=overhead)
    assert predict_us(packed(batch, None), 16, CostModel()) == pytest.approx(levels_us, rel=0.1, abs=overhead)
    chosen = len(packed(batch, CostModel()).levels)
    assert chosen == (1 if plain_us < levels_us else 2), "the faster of the two is chosen"


@pytest.mark.parametrize(("shape", "plain_us", "three_us", "two_us"), MEASURED_FORESTS)
def test_the_model_is_near_what_was_measured_for_forests(
    shape: tuple[int, int, int, int, int, int], plain_us: float, three_us: float, two_us: float
) -> None:
    batch = grid(*shape)
    for model, measured in ((PLAIN, plain_us), (None, three_us)):
        assert predict_us(packed(batch, model), 16, CostModel()) == pytest.approx(measured, rel=0.12)
    num_systems, system_len, num_documents, document_len, _, size = shape
    ends = (system_len // 16, (system_len + document_len) // 16)
    systems = even_runs(size, num_systems, 0, ends[0])
    top = predict_us(levels(batch, systems, range(size)), 16, CostModel())
    assert top == pytest.approx(two_us, rel=0.12)
    documents = even_runs(size, num_systems * num_documents, *ends)
    bottom = predict_us(levels(batch, documents, range(size)), 16, CostModel())
    best = min(top, bottom, *(predict_us(packed(batch, model), 16, CostModel()) for model in (PLAIN, None)))
    chosen = predict_us(packed(batch, CostModel()), 16, CostModel())
    assert chosen == pytest.approx(best)
    assert chosen <= 1.12 * min(plain_us, three_us, two_us)


def even_runs(batch: int, num_runs: int, begin: int, end: int) -> list[SlowRun]:
    """The batch cut into runs of equally many sequences."""
    each = batch // num_runs
    return [SlowRun(frozenset(range(first, first + each)), begin, end) for first in range(0, batch, each)]


def test_the_prefix_of_the_docstring() -> None:
    model = CostModel()
    again, first = model.again_us(np.array([1])), model.first_us(np.array([8]))
    assert 8 * 16000 * float(again[0]) == pytest.approx(53.5, abs=0.05)
    assert 16000 * (model.memory_us - model.reread_us) == pytest.approx(8.9, abs=0.05)
    assert 16000 * float(first[0]) == pytest.approx(15.6, abs=0.05)
    assert model.first_us(np.array([8])) == model.first_us(np.array([16])), "8 rows of 4 heads fill half a tile"
    assert len(packed(grid(1, 16000, 1, 0, 16, 8), model).levels) == 2


# -- the best choice ---------------------------------------------------------------------------------------------------


def tensors(level: SlowLevel, page_size: int, last: Sequence[int] | None) -> HybridLevel:
    num_pages = [len(pages) for pages in level.pages]
    if last is None:
        last = [page_size if n else 0 for n in num_pages]
    flat = [page for pages in level.pages for page in pages]
    parts = (np.cumsum([0, *level.rows]), np.cumsum([0, *num_pages]), np.array(flat), np.array(last))
    return HybridLevel(*(torch.from_numpy(part.astype(np.int32)) for part in parts))


def levels(batch: Batch, kept: Sequence[SlowRun], order: Sequence[int]) -> FlashInferHybridData:
    """The batch with these runs as groups, built from the definition."""
    *shared, own = slow_levels(batch, kept, order)
    last = [(batch.num_tokens[i] - 1) % batch.page_size + 1 for i in order]
    made = [*(tensors(level, batch.page_size, None) for level in shared), tensors(own, batch.page_size, last)]
    return FlashInferHybridData(tuple(made), torch.tensor(order, dtype=torch.int64))


models = st.builds(
    CostModel,
    kv_bytes_per_token=st.sampled_from([4096.0, 1e6]),
    flops_per_row=st.sampled_from([0.0, 16384.0, 1e6]),
    heads_per_kv_head=st.sampled_from([1.0, 4.0, 16.0]),
    reread_bytes_per_s=st.sampled_from([4.2e12, 9.8e12]),
    level_overhead_us=st.sampled_from([0.0, 0.001, 0.02, 0.3, 5.0]),
)


def holders(batch: Batch, run: SlowRun) -> set[int]:
    """Sequences with any page of the run, shareable or not: what reads it as its own is outside the choice."""
    pages = set(batch.tables[min(run.members)][run.begin : run.end].tolist())
    return {i for i, table in enumerate(batch.tables) if pages & set(table.tolist())}


@settings(max_examples=200)
@given(batches(), models)
def test_no_choice_of_runs_is_predicted_to_be_faster(batch: Batch, model: CostModel) -> None:
    runs = slow_runs(batch)
    assume(len(runs) < 8)  # of more there are too many choices to try them all
    assume(all(holders(batch, run) == run.members for run in runs))
    data = packed(batch, model)
    check_hybrid(data, batch.tables, batch.num_tokens, batch.query_lens, batch.page_size, model)
    order = slow_order(runs, frozenset(range(len(batch.tables))))
    choices = (kept for size in range(len(runs) + 1) for kept in combinations(runs, size))
    best = min(predict_us(levels(batch, kept, order), batch.page_size, model) for kept in choices)
    assert predict_us(data, batch.page_size, model) == pytest.approx(best, rel=1e-9)


@given(batches())
def test_a_level_that_costs_too_much_is_not_built_and_the_order_stays(batch: Batch) -> None:
    data = packed(batch, PLAIN)
    assert len(data.levels) == 1
    assert data.order.tolist() == list(range(len(batch.tables)))
    check_hybrid(data, batch.tables, batch.num_tokens, batch.query_lens, batch.page_size, PLAIN)


def test_a_chain_of_runs_is_cut_to_the_levels_that_pay() -> None:
    """Sequence i shares i pages with all after it: 40 runs, one inside the other."""
    tables = [[*range(i + 1), 1000 + i] for i in range(41)]
    batch = batch_of(tables, [16] * 41, 16, [1] * 41)
    assert len(packed(batch, None).levels) == 41
    model = CostModel(level_overhead_us=1.0)
    data = packed(batch, model)
    assert 1 < len(data.levels) < 10
    check_hybrid(data, batch.tables, batch.num_tokens, batch.query_lens, 16, model)
    assert predict_us(data, 16, model) < min(predict_us(packed(batch, other), 16, model) for other in (None, PLAIN))


def test_a_short_system_prompt_is_read_with_each_document() -> None:
    """Four documents for two sequences each: a level for the prompt alone would save less than it costs."""
    data = packed(grid(1, 12800, 4, 16000, 16, 8), CostModel())
    assert len(data.levels) == 2
    assert np.diff(data.levels[0].kv_page_indptr.numpy()).tolist() == [1800] * 4


def test_auto_is_the_model_of_a_common_size_on_the_default_device() -> None:
    for batch in (grid(1, 32768, 1, 0, 256, 16), grid(1, 256, 1, 0, 256, 8)):
        data = pack_hybrid(batch.tables, batch.num_tokens, page_size=16, query_lens=None, cost_model="auto")
        assert len(data.levels) == len(packed(batch, CostModel.for_heads(32, 8, 128, 2)).levels)


def test_no_runs_are_no_choice() -> None:
    none = np.zeros(0, dtype=np.int64)
    for model in (CostModel(), CostModel.for_heads(32, 8, 128, 2)):
        assert runs_that_pay([], np.array([0]), none, 16, model) == []
    assert len(packed(FOREST, CostModel()).levels) == 1, "a forest of a few pages never pays on a real device"


# -- its numbers -------------------------------------------------------------------------------------------------------


def test_the_sizes_of_a_model_give_its_bytes_and_operations() -> None:
    model = CostModel.for_heads(32, 8, 128, 2)
    assert (model.kv_bytes_per_token, model.flops_per_row, model.heads_per_kv_head) == (4096, 16384, 4)
    model = CostModel.for_heads(num_qo_heads=64, num_kv_heads=64, head_dim=64, element_size=1)
    assert (model.kv_bytes_per_token, model.flops_per_row, model.heads_per_kv_head) == (8192, 16384, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bytes_per_s", 0),
        ("flops_per_s", -1.0),
        ("level_overhead_us", float("nan")),
        ("launch_us", float("inf")),
        ("kv_bytes_per_token", True),
        ("flops_per_row", "16384"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(BadValueError, match=name):
        CostModel(**{name: value})  # type: ignore[arg-type]  # as callers without type checks do
