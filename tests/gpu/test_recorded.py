"""The planner against every choice that was measured, from the recorded rows; runs without a GPU."""

from __future__ import annotations

import json
import statistics
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu_shapes import PAGE_SIZE, Shape, tables_of
from seqattn.cost import CostModel, runs_that_pay
from seqattn.device import Device, Groups
from seqattn.fit import Measured, predict
from seqattn.forest import Run, build_forest
from seqattn.groups import groups_of
from tests.sources import ROOT

DEVICE = Device()
MODEL = CostModel.for_heads(32, 8, 128, 2, device=DEVICE)


def recorded(name: str) -> list[dict[str, Any]]:
    text = (ROOT / f"benchmarks/results/{name}.jsonl").read_text(encoding="utf-8")
    about, *rows = map(json.loads, text.splitlines())
    return [row | {"seed": about["seed"]} for row in rows]


#: shapes of the design and some drawn from a seed; and some drawn from another
ROWS = [row for seed in ("", "_seed11", "_seed23", "_seed37") for row in recorded(f"gpu_attention_h200{seed}")]
#: the planner may lose 5 % at most, but here: where it loses more the difference is of a few microseconds, or it is
#: named with what it loses
LOSSES = {
    "(64, 144, 64)": 0.09,
    "(256, 80, 192)": 0.06,
    "(1, 5664, 2, 2640, 320) for 16": 0.08,
    "(1, 8016, 4, 1648, 1648) for 16": 0.09,
    "(1, 16384, 32, 2048, 128) for 256": 0.06,
    "(4, 6416, 8, 160, 128) for 128": 0.07,
}


class Recorded:
    """A recorded shape, and what is predicted for each way that was measured."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row
        tables = tables_of(Shape(*row["shape"]), row["seed"])
        self.lens = np.array([len(table) * PAGE_SIZE for table in tables])
        _, self.runs = build_forest(tables, ((self.lens - 1) // PAGE_SIZE).tolist())
        self.depths = depths_of(self.runs)
        self.before = np.arange(len(tables) + 1)
        steps = [self.step(name) for name in row["choices"]]
        self.predicted = dict(zip(row["choices"], predict(steps, MODEL.heads, DEVICE).tolist(), strict=True))

    def step(self, name: str) -> Measured:
        parts = [] if name == "plain" else [part.split(":") for part in name.split("+")]
        slices = [int(way[4:]) if way.startswith("fa3") else 0 for _, way in parts]
        return Measured(0, self.levels({int(depth) for depth, _ in parts}), slices, 1.0)

    def levels(self, kept: set[int]) -> list[Groups]:
        mask = [depth in kept for depth in self.depths]
        return groups_of(self.runs, mask, self.before, self.lens, page_size=PAGE_SIZE)

    @property
    def chosen(self) -> str:
        """The best of what was measured, by the planner's figures and with its margins."""
        num_shared = [0 if name == "plain" else 1 + name.count("+") for name in self.predicted]
        names: list[str] = list(self.predicted)
        return names[DEVICE.choose_by(list(self.predicted.values()), num_shared)]

    @property
    def loss(self) -> float:
        """How much longer that takes than the fastest way."""
        choices = self.row["choices"]
        return float(choices[self.chosen] / min(choices.values()) - 1)


def depths_of(runs: list[Run]) -> list[int]:
    depths: list[int] = []
    for run in runs:
        depths.append(0 if run.parent is None else depths[run.parent] + 1)
    return depths


SHAPES = [Recorded(row) for row in ROWS]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.row["name"])
def test_what_the_planner_chooses_was_near_the_best_that_was_measured(shape: Recorded) -> None:
    choices = shape.row["choices"]
    assert choices[shape.chosen] <= 1.02 * choices["plain"], "levels never lose to plain attention"
    assert shape.loss <= LOSSES.get(shape.row["name"], 0.05), f"{shape.chosen} of {choices}"
    assert shape.predicted[shape.chosen] == pytest.approx(choices[shape.chosen], rel=0.2)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.row["name"])
def test_the_planner_weighs_every_set_of_levels(shape: Recorded) -> None:
    """Its own way takes no longer, by its own figures and with its margin for levels, than any that was measured."""
    kept = runs_that_pay(shape.runs, shape.before, shape.lens, PAGE_SIZE, MODEL)
    groups = groups_of(shape.runs, kept, shape.before, shape.lens, page_size=PAGE_SIZE)
    best = DEVICE.step_us(groups, MODEL.heads)
    harder = 1 + DEVICE.level_margin
    others = [us * harder ** name.count("+") for name, us in shape.predicted.items() if any(kept)]
    assert best * harder ** max(len(groups) - 2, 0) <= min([*others, shape.predicted["plain"]]) * (1 + 1e-6)


def test_the_planner_is_right_in_most_cases() -> None:
    losses = [shape.loss for shape in SHAPES]
    assert statistics.median(losses) <= 0.01
    assert statistics.mean(losses) <= 0.01


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_the_recorded_steps_were_right_and_no_slower_than_others(row: dict[str, Any]) -> None:
    assert row["error"] <= 1e-2
    assert row["ours_us"] <= row["cascade_us"] / 1.6
    assert row["ours_us"] <= 1.08 * row["plain_us"]
