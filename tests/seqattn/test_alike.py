"""Forests whose runs are alike: one by one, their steps take what they take by numpy."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import evolve
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from seqattn.alike import AlikeSteps
from seqattn.cost import CostModel, runs_that_pay
from seqattn.device import Device, Heads
from seqattn.forest import Run
from seqattn.groups import RunArrays, cut_of
from seqattn.load import SLICES, slices_for

PAGE_SIZE = 16
CHOICES = [(), (0,), (1,), (0, 1)]


def forest(num_systems: int, num_documents: int, each: int, pages: tuple[int, int]) -> tuple[list[Run], int]:
    """Runs of prompts with so many documents, each of so many sequences; and how many sequences there are."""
    runs: list[Run] = []
    size = num_documents * each
    for system in range(num_systems):
        runs.append(Run(system * size, (system + 1) * size, 0, pages[0], None))
        parent = len(runs) - 1
        if num_documents > 1:
            first = range(system * size, (system + 1) * size, each)
            runs += [Run(i, i + each, pages[0], pages[0] + pages[1], parent) for i in first]
    return runs, num_systems * size


heads = st.sampled_from([Heads(), Heads(32, 32), Heads(8, 1), Heads(4, 2, 64)])
few, pages = st.integers(1, 5), st.tuples(st.integers(1, 900), st.integers(1, 300))


@settings(max_examples=150)
@given(few, few, st.integers(2, 12), pages, heads, st.integers(1, 3), st.booleans(), st.booleans())
def test_one_by_one_steps_take_as_long_as_all_together(
    num_systems: int,
    num_documents: int,
    each: int,
    pages: tuple[int, int],
    heads: Heads,
    rows_each: int,
    ragged: bool,
    has_fa3: bool,
) -> None:
    runs, batch = forest(num_systems, num_documents, each, pages)
    device = evolve(Device(), has_fa3=has_fa3)
    own = np.random.default_rng(batch).integers(3, 2000, batch) if ragged else np.full(batch, 200)
    num_tokens = own + PAGE_SIZE * (sum(pages) if num_documents > 1 else pages[0])
    arrays = RunArrays(runs, rows_each * np.arange(batch + 1))
    assert arrays.all_alike()
    choices = CHOICES if num_documents > 1 else CHOICES[:2]
    kept = np.array([[depth in choice for depth in arrays.depth.tolist()] for choice in choices])
    cut, num_shared = cut_of(arrays, kept, num_tokens, np.full(batch, rows_each), page_size=PAGE_SIZE)
    steps = AlikeSteps(device, heads, arrays, num_tokens, rows_each, page_size=PAGE_SIZE)
    assert [steps.least_us(choice) for choice in choices] == pytest.approx(device.times(cut, num_shared, heads))
    assert steps.best(choices) == device.choose(cut, num_shared, heads)


@given(few, few, st.integers(2, 4), st.randoms())
def test_runs_that_differ_in_anything_are_not_alike(
    num_systems: int, num_documents: int, each: int, random: object
) -> None:
    runs, batch = forest(num_systems, num_documents, each, (4, 3))
    rows = np.arange(batch + 1)
    assert RunArrays(runs, rows).all_alike()
    assert not RunArrays(runs, np.arange(batch + 2)).all_alike(), "a sequence shares nothing"
    i = random.randrange(len(runs))  # type: ignore[attr-defined]
    depth_is_shared = sum(run.begin == runs[i].begin for run in runs) > 1
    assume(depth_is_shared)
    longer = Run(runs[i].first, runs[i].stop, runs[i].begin, runs[i].end + 1, runs[i].parent)
    assert not RunArrays([*runs[:i], longer, *runs[i + 1 :]], rows).all_alike()
    more_rows = rows + (rows > runs[i].first)
    assert not RunArrays(runs, more_rows).all_alike()


def test_sequences_of_different_rows_are_weighed_by_numpy() -> None:
    """Nor are they wrong: a hundred rows of one sequence make the shared level no worse."""
    runs, batch = forest(1, 1, 64, (1024, 1))
    rows_before = np.concatenate(([0], 100 + np.arange(batch)))
    model = CostModel.for_heads(32, 8, 128, 2, device=Device())
    num_tokens = np.full(batch, 1024 * PAGE_SIZE + 256)
    assert runs_that_pay(runs, rows_before, num_tokens, PAGE_SIZE, model) == [True]


def test_lists_are_cut_into_no_more_slices_than_were_seen_to_be_good() -> None:
    assert slices_for(Heads(), SLICES).tolist() == [1, 2, 4, 8]
    assert slices_for(Heads(32, 32), SLICES).tolist() == [1, 2, 4, 8]
    assert slices_for(Heads(8, 1), SLICES).tolist() == [1, 2, 4, 8, 16, 32]
    assert slices_for(Heads(), SLICES[:0]).tolist() == []


def test_a_choice_must_be_faster_by_its_margins() -> None:
    device = evolve(Device(), margin=0.1, margin_us=1.0, level_margin=0.05)
    assert device.choose_by([100.0, 90.0], [0, 1]) == 0, "a tenth of plain attention's time and a microsecond"
    assert device.choose_by([100.0, 88.9], [0, 1]) == 1
    assert device.choose_by([100.0, 60.0, 58.0], [0, 1, 2]) == 1, "a second level must save a twentieth"
    assert device.choose_by([100.0, 60.0, 57.0], [0, 1, 2]) == 2
    assert device.choose_by([100.0], [0]) == 0
