"""All runs at once, from what neighbours have in common, against the walk branch by branch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqattn import neighbours
from seqattn.forest import Run, build_forest
from seqattn.neighbours import grouped_runs
from tests.seqattn.truth import Batch, Table, batches, slow_order, slow_runs

Runs = list[tuple[int, int, int]]

#: the sequences of the picture, which go on with pages of their own
PICTURE = [[7, 8, 5], [7, 8, 4, 3], [7, 8, 4, 3], [2, 1], [2, 0], [6]]


def long_tables(tables: Sequence[Sequence[int]]) -> list[Table]:
    """The tables, each with pages of its own up to a length behind all that is shared."""
    num_pages = 2 + max(map(len, tables))
    own = range(10**6, 10**9, 10**3)
    return [
        np.array([*table, *range(begin, begin + num_pages - len(table))], dtype=np.int32)
        for table, begin in zip(tables, own, strict=False)
    ]


def all_at_once(tables: Sequence[Table], limits: Sequence[int], depth: int = 0) -> Runs | None:
    """The runs, however few the sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_FEWEST", 2)
        return grouped_runs(tables, limits, depth, min(limits))


def forest(tables: Sequence[Table], limits: Sequence[int], fewest: int) -> tuple[list[int], list[Run]]:
    """The forest, where from so many sequences on all neighbours are compared at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_FEWEST", fewest)
        patch.setattr("seqattn.forest._MANY", 2)
        return build_forest(tables, limits)


def grouped(batch: Batch) -> Batch:
    """The batch in the order of its forest."""
    order = slow_order(slow_runs(batch), frozenset(range(len(batch.tables))))
    return Batch(
        batch.page_size,
        [batch.tables[i] for i in order],
        [batch.num_tokens[i] for i in order],
        [batch.query_lens[i] for i in order],
    )


def test_the_runs_of_the_picture() -> None:
    tables = long_tables(PICTURE)
    assert all_at_once(tables, [5] * 6) == [(0, 2, 3), (1, 4, 3), (3, 1, 5)]
    assert all_at_once(tables[:3], [5] * 3, depth=2) == [(1, 4, 3)]


def test_a_sequence_that_may_share_no_more_leaves_its_run() -> None:
    tables = long_tables([[7, 8], [7, 8], [7, 8], [2, 1], [2, 1]])
    assert all_at_once(tables, [1, 1, 1, 1, 1]) == [(0, 1, 3), (3, 1, 5)]
    assert all_at_once(tables, [1, 2, 2, 3, 3]) is None, "some agree further than all may share"
    assert all_at_once(tables, [2, 2, 3, 3, 2]) == [(0, 2, 3), (3, 2, 5)]
    tables[1][2] = tables[0][2]
    assert all_at_once(tables, [2, 2, 2, 2, 2]) == [(0, 2, 3), (3, 2, 5)], "the last page is no longer shareable"


@pytest.mark.parametrize(
    "tables",
    [[[7, 8], [2, 1], [7, 8]], [[7, 8], [7, 9], [7, 8], [2]], [[7, 8, 5], [7, 8, 6], [2, 8, 5], [2, 8, 6]]],
    ids=["a run in two parts", "one in two parts inside another", "known pages behind others"],
)
def test_what_cannot_be_seen_to_be_grouped_is_walked(tables: list[list[int]]) -> None:
    long = long_tables(tables)
    assert all_at_once(long, [4] * len(tables)) is None
    order, runs = forest(long, [4] * len(tables), 2)
    assert len(runs) == len(slow_runs(Batch(1, long, [5] * len(long), [1] * len(long))))
    assert sorted(order) == list(range(len(tables)))


def test_tables_that_end_with_what_they_share_are_walked() -> None:
    tables = [np.array([7, 8], dtype=np.int32), np.array([7, 8], dtype=np.int32), np.array([2, 1], dtype=np.int32)]
    assert all_at_once(tables, [2, 2, 2]) is None
    assert forest(tables, [2, 2, 2], 2) == ([0, 1, 2], [Run(0, 2, 0, 2, None)])


@given(batches(max_sequences=24))
def test_every_batch_that_is_grouped_and_long_is_seen_at_once(batch: Batch) -> None:
    tables = long_tables([table.tolist() for table in batch.tables])
    num_tokens = [len(table) for table in tables]
    batch = grouped(Batch(1, tables, num_tokens, [1] * len(tables)))
    order, runs = forest(batch.tables, batch.limits, 10**9)
    assert order == list(range(len(tables)))
    if len(tables) > 1 and not (runs and runs[0].stop == len(tables)):
        assert all_at_once(batch.tables, batch.limits) == [(run.first, run.end, run.stop) for run in runs]
    assert forest(batch.tables, batch.limits, 2) == (order, runs)


@pytest.mark.parametrize(("documents", "at_once"), [(1, False), (3, True)])
def test_few_branches_are_found_at_once_where_they_have_branches(
    documents: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = long_tables([[p, 10 * p + d, 10 * p + d + 5] for p in (1, 2) for d in range(documents) for _ in range(6)])
    found: list[Runs | None] = []

    def noted(tables: Sequence[Table], limits: Sequence[int], depth: int, least: int) -> Runs | None:
        found.append(grouped_runs(tables, limits, depth, least))
        return found[-1]

    monkeypatch.setattr("seqattn.forest.grouped_runs", noted)
    order, runs = build_forest(tables, [4] * len(tables))
    assert order == list(range(len(tables)))
    assert len(runs) == 2 * (1 + documents * at_once)
    assert found == ([[(run.first, run.end, run.stop) for run in runs]] if at_once else [])


@given(batches(max_sequences=24), st.booleans())
def test_the_forest_is_the_same_in_any_order(batch: Batch, in_order: bool) -> None:
    if in_order:
        batch = grouped(batch)
    assert forest(batch.tables, batch.limits, 2) == forest(batch.tables, batch.limits, 10**9)
