"""Forests whose runs are alike: one by one, their steps take what they take by numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from attrs import evolve
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from seqattn.alike import AlikeRuns, AlikeSteps
from seqattn.cost import CostModel, runs_that_pay
from seqattn.device import Device, Heads
from seqattn.forest import Run
from seqattn.groups import RunArrays, cut_of
from seqattn.load import SLICES, slices_for
from seqattn.steps import NUMBERS, step_us

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


def least_times(steps: AlikeSteps, choices: Sequence[tuple[int, ...]]) -> list[float]:
    return [steps.by.least(steps.step(choice))[0] for choice in choices]


def by_margins(device: Device, times: Sequence[float], num_shared: Sequence[int]) -> int:
    """The choice of these times to take, by what the margins are defined as."""
    harder = [us * device.harder(n) for us, n in zip(times, num_shared, strict=True)]
    best = min(range(len(times)), key=harder.__getitem__)
    return best if times[best] < device.enough_us(times[0]) else 0


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
    alike = AlikeRuns.of(runs, batch, 2)
    assert alike is not None
    assert alike.depths == arrays.depth.tolist()
    choices = CHOICES if num_documents > 1 else CHOICES[:2]
    kept = np.array([[depth in choice for depth in arrays.depth.tolist()] for choice in choices])
    cut, num_shared = cut_of(arrays, kept, num_tokens, np.full(batch, rows_each), page_size=PAGE_SIZE)
    steps = AlikeSteps(device, heads, alike, num_tokens, rows_each, page_size=PAGE_SIZE)
    times = least_times(steps, choices)
    assert times == pytest.approx(device.times(cut, num_shared, heads))
    assert steps.best(choices) == device.choose(cut, num_shared, heads) == by_margins(device, times, num_shared)


devices = st.builds(
    evolve,
    st.just(Device()),
    level_us=st.sampled_from([0.0, 6.694, 40.0]),
    spread=st.sampled_from([0.0, 0.2938, 1.0]),
    fa2_waits=st.sampled_from([0.0, 0.3281, 2.0]),
    margin=st.sampled_from([0.0, 0.01, 0.3]),
    level_margin=st.sampled_from([0.0, 0.015, 0.3]),
)


@settings(max_examples=300)
@example(
    2, 3, 2, (1, 25), Heads(), evolve(Device(), level_us=0.0, spread=0.0, fa2_waits=0.0), 1
)  # no faster than alone
@given(few, few, st.integers(2, 12), pages, heads, devices, st.integers(1, 2000))
def test_no_way_is_left_out_that_could_be_the_fastest(
    num_systems: int, num_documents: int, each: int, pages: tuple[int, int], heads: Heads, device: Device, own: int
) -> None:
    """No step is shorter than the least that it may take, by which ways are left out; the choice is that of all."""
    runs, batch = forest(num_systems, num_documents, each, pages)
    alike = AlikeRuns.of(runs, batch, 2)
    assert alike is not None
    num_tokens = np.random.default_rng(own).integers(1, 1 + own, batch) + PAGE_SIZE * sum(alike.pages)
    steps = AlikeSteps(device, heads, alike, num_tokens, 1, page_size=PAGE_SIZE)
    choices = CHOICES if num_documents > 1 else CHOICES[:2]
    for at_least, top, lower, last in (way for choice in choices[1:] for way in steps.by.all(steps.step(choice))):
        assert at_least <= step_us(device, top, lower, last, NUMBERS) * (1 + 1e-9)
    num_shared = [len(choice) for choice in choices]
    assert steps.best(choices) == by_margins(device, least_times(steps, choices), num_shared)


@given(few, few, st.integers(2, 4), st.randoms())
def test_runs_that_differ_in_anything_are_not_alike(
    num_systems: int, num_documents: int, each: int, random: object
) -> None:
    runs, batch = forest(num_systems, num_documents, each, (4, 3))
    num_depths = 1 + (num_documents > 1)
    assert AlikeRuns.of(runs, batch, num_depths) is not None
    assert AlikeRuns.of(runs, batch, num_depths - 1) is None, "more depths than are asked for"
    assert AlikeRuns.of(runs, batch + 1, num_depths) is None, "a sequence shares nothing"
    i = random.randrange(len(runs))  # type: ignore[attr-defined]
    depth_is_shared = sum(run.begin == runs[i].begin for run in runs) > 1
    assume(depth_is_shared)
    for other in (runs[i]._replace(end=runs[i].end + 1), runs[i]._replace(stop=runs[i].stop + 1)):
        assert AlikeRuns.of([*runs[:i], other, *runs[i + 1 :]], batch, num_depths) is None


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
    assert device.enough_us(100.0) == pytest.approx(89.0), "a tenth of plain attention's time and a microsecond"
    assert [device.harder(n) for n in (0, 1, 2, 3)] == pytest.approx([1, 1, 1.05, 1.05**2]), "a twentieth a level"
    assert by_margins(device, [100.0, 90.0], [0, 1]) == 0
    assert by_margins(device, [100.0, 88.9], [0, 1]) == 1
    assert by_margins(device, [100.0, 60.0, 58.0], [0, 1, 2]) == 1
    assert by_margins(device, [100.0, 60.0, 57.0], [0, 1, 2]) == 2
    assert by_margins(device, [100.0], [0]) == 0
