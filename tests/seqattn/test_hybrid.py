"""Packing into levels: against the forest's definition, and its invariants, each with a planted bug that it catches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from seqattn.errors import BadValueError, InvariantError, LengthError
from seqattn.forest import Run, build_forest
from seqattn.hybrid import CostModel, check_hybrid, pack_hybrid
from seqattn.packed import FlashInferHybridData, HybridLevel
from tests.seqattn.truth import (
    FOREST,
    Batch,
    SlowLevel,
    batch_of,
    batches,
    int32,
    slow_levels,
    slow_order,
    slow_runs,
)


def packed(batch: Batch, cost_model: Any = None) -> FlashInferHybridData:  # noqa: ANN401  as pack_hybrid's
    return pack_hybrid(
        batch.tables,
        batch.num_tokens,
        page_size=batch.page_size,
        query_lens=batch.query_lens,
        cost_model=cost_model,
    )


def check(data: FlashInferHybridData, batch: Batch, cost_model: CostModel | None = None) -> None:
    check_hybrid(data, batch.tables, batch.num_tokens, batch.query_lens, batch.page_size, cost_model)


def as_lists(level: HybridLevel) -> SlowLevel:
    indptr = level.kv_page_indptr.tolist()
    pages = [level.kv_page_indices[a:b].tolist() for a, b in pairwise(indptr)]
    return SlowLevel(np.diff(level.qo_indptr.numpy()).tolist(), pages)


# -- the forest --------------------------------------------------------------------------------------------------------


def test_the_worked_forest_for_decode() -> None:
    data = packed(FOREST)
    assert [level.qo_indptr.tolist() for level in data.levels] == [[0, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert [level.kv_page_indptr.tolist() for level in data.levels] == [[0, 3, 5, 5], [0, 1, 3, 4, 5, 8, 9]]
    shared, own = (level.kv_page_indices.tolist() for level in data.levels)
    assert (shared, own) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12, 13])
    assert [level.kv_last_page_len.tolist() for level in data.levels] == [[16, 16, 0], [10, 4, 16, 5, 1, 7]]
    assert data.order.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_worked_forest_for_append() -> None:
    data = packed(FOREST._replace(query_lens=[4, 20, 1, 5, 3, 7]))
    assert [level.qo_indptr.tolist() for level in data.levels] == [[0, 25, 33, 40], [0, 4, 24, 25, 30, 33, 40]]
    assert data.levels[0].kv_page_indices.tolist() == [0, 1, 2, 3, 4]


def test_a_shuffled_batch_gives_the_same_groups_and_says_where_they_came_from() -> None:
    shuffle = [5, 3, 0, 4, 2, 1]
    batch = batch_of(
        [FOREST.tables[i].tolist() for i in shuffle], [[10, 4, 16, 5, 1, 7][i] for i in shuffle], 16, [1] * 6
    )
    data = packed(batch)
    check(data, batch)
    assert data.order.tolist() == [0, 1, 3, 2, 4, 5]  # x | b0 b1 | a0 a2 a1: branches by their first sequence
    assert as_lists(data.levels[0]) == SlowLevel([1, 2, 3], [[], [3, 4], [0, 1, 2]])


def test_the_runs_of_the_picture() -> None:
    tables = [[7, 8, 5], [7, 8, 4, 3, 9], [7, 8, 4, 3, 6], [2, 1], [2, 0], [6]]
    order, runs = build_forest([np.array(table, dtype=np.int32) for table in tables], [3, 5, 5, 2, 2, 1])
    assert order == [0, 1, 2, 3, 4, 5]
    assert runs == [Run(0, 3, 0, 2, None), Run(1, 3, 2, 4, 0), Run(3, 5, 0, 1, None)]


def test_empty_groups_join_neighbours_but_never_across_a_group_above() -> None:
    """Under A two sequences share more; the third, and all of B and x, have no second level: two empty groups."""
    tables = [[0, 1, 2, 9], [0, 1, 2, 10], [0, 11], [5, 12], [5, 13], [14], [15]]
    batch = batch_of(tables, [1] * 7, 4, [1] * 7)
    data = packed(batch)
    check(data, batch)
    assert as_lists(data.levels[0]) == SlowLevel([3, 2, 2], [[0], [5], []])
    assert as_lists(data.levels[1]) == SlowLevel([2, 1, 2, 2], [[1, 2], [], [], []])


def test_a_sequence_with_fewer_shareable_pages_leaves_the_run_early() -> None:
    """Sequence 1 computes its last 9 tokens anew: only two of its pages may be shared, the others share four."""
    batch = batch_of([[0, 1, 2, 3, 7], [0, 1, 2, 3, 8], [0, 1, 2, 3, 9]], [1, 1, 1], 4, [1, 9, 1])
    data = packed(batch)
    check(data, batch)
    assert data.order.tolist() == [0, 2, 1]
    assert [as_lists(level) for level in data.levels] == [
        SlowLevel([11], [[0, 1]]),
        SlowLevel([2, 9], [[2, 3], []]),
        SlowLevel([1, 1, 9], [[7], [9], [2, 3, 8]]),
    ]


def test_new_tokens_stay_in_the_last_level_even_where_their_pages_are_equal() -> None:
    batch = batch_of([[0, 1], [0, 1]], [4, 4], 4, [1, 1])
    assert [as_lists(level) for level in packed(batch).levels] == [SlowLevel([2], [[0]]), SlowLevel([1, 1], [[1], [1]])]
    alone = batch_of([[0, 1], [0, 1]], [4, 4], 4, [5, 5])
    assert [as_lists(level) for level in packed(alone).levels] == [SlowLevel([5, 5], [[0, 1], [0, 1]])]


@given(batches())
def test_levels_are_those_of_the_definition(batch: Batch) -> None:
    data = packed(batch)
    runs = slow_runs(batch)
    order = slow_order(runs, frozenset(range(len(batch.tables))))
    assert data.order.tolist() == order
    assert [as_lists(level) for level in data.levels] == slow_levels(batch, runs, order)
    check(data, batch)


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True), min_size=1, max_size=6), st.data())
def test_pages_that_are_equal_in_the_middle_only_are_not_shared(tables: list[list[int]], data: st.DataObject) -> None:
    """Tables that hold the same pages at other places or behind other pages, as made by hand."""
    last = [data.draw(st.integers(1, 2)) for _ in tables]
    batch = batch_of(tables, last, 2, [1] * len(tables))
    runs = slow_runs(batch)
    order = slow_order(runs, frozenset(range(len(tables))))
    assert [as_lists(level) for level in packed(batch).levels] == slow_levels(batch, runs, order)
    check(packed(batch), batch)


@given(batches())
def test_an_order_that_is_grouped_already_is_kept(batch: Batch) -> None:
    order = packed(batch).order.tolist()
    grouped = batch._replace(
        tables=[batch.tables[i] for i in order],
        num_tokens=[batch.num_tokens[i] for i in order],
        query_lens=[batch.query_lens[i] for i in order],
    )
    assert packed(grouped).order.tolist() == list(range(len(order)))


def test_no_query_lens_are_one_row_for_each_sequence() -> None:
    data = pack_hybrid(FOREST.tables, FOREST.num_tokens, page_size=16, query_lens=None, cost_model=None)
    assert [level.qo_indptr.tolist() for level in data.levels] == [[0, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6]]


def test_an_empty_batch_is_one_empty_level() -> None:
    data = pack_hybrid([], [], page_size=16, query_lens=None, cost_model=None)
    assert [as_lists(level) for level in data.levels] == [SlowLevel([], [])]
    assert data.order.tolist() == []
    data.check(16)


def test_tables_with_gaps_or_of_wider_integers_are_read_as_they_are() -> None:
    base = np.arange(4000, dtype=np.int32)
    tables = [np.concatenate((base[:40], base[100 * i + 100 : 100 * i + 110])) for i in range(20)]
    lens = [16 * len(table) for table in tables]
    want = pack_hybrid(tables, lens, page_size=16, query_lens=None, cost_model=None)
    variants: Any = ([np.repeat(table, 2)[::2] for table in tables], [table.astype(np.int64) for table in tables])
    for others in variants:
        data = pack_hybrid(others, lens, page_size=16, query_lens=None, cost_model=None)
        assert [level.kv_page_indices.tolist() for level in data.levels] == [
            level.kv_page_indices.tolist() for level in want.levels
        ]
        assert all(level.kv_page_indices.dtype == torch.int32 for level in data.levels)


def test_levels_share_no_memory_with_the_tables() -> None:
    tables = [table.copy() for table in FOREST.tables]
    data = pack_hybrid(tables, FOREST.num_tokens, page_size=16, query_lens=None, cost_model=None)
    for table in tables:
        table[:] = 99
    assert data.levels[0].kv_page_indices.tolist() == [0, 1, 2, 3, 4]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_lens": [1, 0, 1, 1, 1, 1]}, r"query_lens\[1\] is 0 for a sequence of 68 tokens"),
        ({"query_lens": [1, 1, 1, 1, 1, 8]}, r"query_lens\[5\] is 8 for a sequence of 7 tokens"),
        ({"query_lens": [1, 1]}, r"query_lens must be one integer for each of 6 sequences, not \[1, 1\]"),
        ({"query_lens": [1.0] * 6}, "query_lens must be one integer for each"),
        ({"num_tokens": [1, 2]}, "num_tokens must be one integer for each of 6 sequences"),
        ({"num_tokens": [58, 68, 64, 37, 65, 0]}, r"query_lens\[5\] is 1 for a sequence of 0 tokens"),
        ({"num_tokens": [58, 68, 64, 37, 65, 17]}, r"tables\[5\] has 1 pages of 16 for 17 tokens"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LengthError, match=message):
        packed(FOREST._replace(**changes))


def test_a_cost_model_of_another_type_is_refused() -> None:
    with pytest.raises(BadValueError, match="cost_model must be None, 'auto' or a CostModel, not 'fast'"):
        packed(FOREST, "fast")


# -- check_hybrid catches planted bugs ---------------------------------------------------------------------------------


def change(data: FlashInferHybridData, level: int, **tensors: Sequence[int]) -> FlashInferHybridData:
    levels = list(data.levels)
    levels[level] = evolve(levels[level], **{name: int32(*values) for name, values in tensors.items()})
    return FlashInferHybridData(tuple(levels), data.order)


@pytest.mark.parametrize(
    ("name", "level", "tensors"),
    [
        ("K1", 0, {"kv_page_indices": [0, 1, 2, 3, 5]}),
        ("K1", 1, {"kv_page_indices": [5, 6, 7, 8, 9, 10, 12, 11, 13]}),
        ("K1", 1, {"kv_last_page_len": [10, 4, 16, 5, 1, 8]}),
        ("K1", 0, {"kv_last_page_len": [16, 3, 0]}),
        ("K1", 0, {"qo_indptr": [0, 2, 5, 6]}),
        ("K2", 0, {"qo_indptr": [0, 3, 5, 7]}),
        ("K2", 1, {"qo_indptr": [0, 2, 3, 4, 5, 6, 7]}),
        ("B2", 1, {"kv_last_page_len": [10, 4, 17, 5, 1, 7]}),
    ],
)
def test_check_finds_a_planted_bug(name: str, level: int, tensors: dict[str, list[int]]) -> None:
    data = packed(FOREST)
    check(data, FOREST)
    with pytest.raises(InvariantError) as caught:
        check(change(data, level, **tensors), FOREST)
    assert caught.value.name == name


def test_check_finds_rows_that_are_not_the_query_lens() -> None:
    batch = FOREST._replace(query_lens=[2, 1, 1, 1, 1, 1])
    other = packed(FOREST._replace(query_lens=[1, 2, 1, 1, 1, 1]))
    with pytest.raises(InvariantError, match="K2: the last level has rows"):
        check(other, batch)


def test_check_finds_a_shared_run_that_was_missed() -> None:
    plain = packed(FOREST, CostModel(level_overhead_us=1e9))
    check(plain, FOREST, CostModel())
    with pytest.raises(InvariantError, match="K3: page 0 is listed in"):
        check(plain, FOREST)


def test_check_finds_a_wrong_order() -> None:
    data = packed(FOREST)
    wrong = FlashInferHybridData(data.levels, torch.tensor([0, 2, 1, 3, 4, 5]))
    with pytest.raises(InvariantError, match="K1: sequence 1"):
        check(wrong, FOREST)
