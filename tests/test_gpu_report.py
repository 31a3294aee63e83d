"""The text of docs/performance.md about a GPU, made from rows of which every figure is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_parts_report, gpu_report
from benchmarks.gpu_parts_report import blocks_of_graphs
from benchmarks.gpu_promises import TIMES
from benchmarks.gpu_report import Recorded, _append, _forks, _older, _steps, _summary, _table

PROMISED, OTHER = "(256, 8192, 512)", "(8, 4144, 112)"


def shape(name: str, ours: float, plain: float, cascade: float, **more: object) -> dict[str, Any]:
    return {"name": name, "ours_us": ours, "plain_us": plain, "cascade_us": cascade, "error": 2e-3} | more


def in_full(name: str, ours: float, plain: float, best: float, **more: float | list[str]) -> dict[str, Any]:
    """A row with every choice; its scattered pages take twice as long."""
    batch, *_ = map(int, name.strip("()").split(","))
    host = {"planner_us": 100.0, "forest_us": 50.0, "pack_us": 300.0, "planner_again_us": 30.0, "bound_us": ours / 1.5}
    kept = {"shape": [batch, 1, 0, 0, 0, 0], "kernels": ["decode:8"], "scattered_us": 2 * ours, **host, **more}
    return shape(name, ours, plain, 4 * ours, choices={"plain": plain, "0:fa3x2": best}, **kept)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    return tmp_path


def recorded(results: Path, name: str, rows: list[dict[str, Any]], version: str = "0.7.2.post1") -> Recorded:
    lines = [{"flashinfer": version}, *rows]
    (results / f"gpu_attention_{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return Recorded(name)


def step(packing: str, **times: float) -> dict[str, Any]:
    names = ("eager_us", "replay_us", "graph_us", "pack_us", "plan_us", "plan_by_hand_us")
    return {"packing": packing, "layers": 32, **dict.fromkeys(names, 1000.0), **times}


STEPS = [
    step("plain", eager_us=30000.0, replay_us=28000.0, graph_us=24000.0),
    step("hybrid", eager_us=6000.0, replay_us=7000.0, graph_us=4000.0),
    {"forks": 64, "layers": 32, "us": 40.4, "slowest_us": 42.3, "bytes_us": 31.6},
]


def test_an_older_flashinfer_is_told_of_beside_the_newer(results: Path) -> None:
    newer = recorded(results, "new", [shape(PROMISED, 200.0, 900.0, 800.0), shape(OTHER, 1.0, 1.0, 1.0)])
    rows = [shape(PROMISED, 250.0, 1000.0, 750.0), shape(OTHER, 51.0, 50.0, 127.5, error=3.4e-3)]
    older = recorded(results, "old", rows, "0.6.18.post1")
    assert _older(newer, older, STEPS).splitlines() == [
        (
            "| shape | ours µs, 0.7.2.post1 | ours µs, 0.6.18.post1 | plain µs, 0.7.2.post1 | plain µs, 0.6.18.post1 | "
            "cascade µs, 0.7.2.post1 | cascade µs, 0.6.18.post1 |"
        ),
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| {PROMISED} | 200.0 | 250.0 | 900.0 | 1000.0 | 800.0 | 750.0 |",
        "",
        (
            "On all 2 shapes ours is at least 2.50 times as fast as the cascade and at most 2.0% behind plain decode; "
            "errors are up to 3.4e-03. Whole steps of 32 layers:"
        ),
        "",
        *_steps(STEPS).splitlines(),
    ]


def test_an_older_flashinfer_that_is_nowhere_behind_plain_is_said_to_be_so(results: Path) -> None:
    rows = [shape(PROMISED, 250.0, 1000.0, 750.0)]
    text = _older(recorded(results, "new", rows), recorded(results, "old", rows, "0.6.18"), STEPS)
    assert "3.00 times as fast as the cascade and nowhere behind plain decode" in text


def test_a_row_of_the_table_has_its_ratios_and_the_best_choice(results: Path) -> None:
    found = recorded(results, "new", [in_full(PROMISED, 100.0, 450.0, 96.0)])
    ratios = f"4.50{TIMES} | 4.00{TIMES}"
    row = f"| {PROMISED} | 450.0 | 400.0 | 100.0 | {ratios} | 200.0 | 96.0 (0:fa3x2) | 1.50 | 2.0e-03 |"
    assert _table(found.rows).splitlines()[2:] == [row]


def test_the_summary_says_what_the_planner_loses_and_where(results: Path) -> None:
    line = {"kernels": ["fa3 in line:2", "decode:8"]}
    several = [
        recorded(
            results, "known", [in_full(PROMISED, 100.0, 450.0, 96.0, **line), in_full(OTHER, 51.0, 50.0, 52.0, **line)]
        ),
        recorded(results, "fresh", [in_full("(4, 1, 1)", 105.0, 400.0, 100.0, scattered_us=84.0, **line)]),
        recorded(results, "ragged", [in_full("(5, 1, 1)", 104.0, 400.0, 100.0, scattered_us=93.6, **line)]),
        recorded(results, "uneven", [in_full("(6, 1, 1)", 103.0, 400.0, 100.0, **line)]),
        recorded(results, "fresh_uneven", [in_full("(7, 1, 1)", 102.0, 400.0, 100.0)]),
        recorded(results, "mixed", [in_full("(9, 1, 1)", 90.0, 400.0, 100.0, cascade_us=180.0)]),
    ]
    lines = _summary(*several).splitlines()
    assert lines[0] == (
        "- On the 2 shapes: 3.1% longer than the best choice that was measured, in the median; most: "
        f"4.2% at {PROMISED}, 2.0% at {OTHER}. Than plain decode 2.0% longer at most."
    )
    losses = [text.split(": ")[1].split()[0] for text in lines[1:6]]
    assert losses == ["5.0%", "4.0%", "3.0%", "2.0%", "0.0%"]
    assert all(text.endswith("Than plain decode 0.0% longer at most.") for text in lines[1:6])
    assert lines[6] == "- Ours is at least 2.00 times as fast as the cascade wrapper, on all 7 shapes (at (9, 1, 1))."
    assert lines[7:] == [
        (
            "- Where a prompt that lies in one piece is read as one array (5 shapes), ours takes 50% less time than "
            "with its pages apart, in the median, and at most 50% less; in 2 of them it takes longer, by up to 25%."
        ),
        (
            "- Finding the shared runs and choosing takes the CPU 150 to 150 µs for a new batch of 256, the choice "
            "alone 30 to 30 µs in the steps that follow. `pack_hybrid`, from page tables to levels, takes 300 to 300 "
            "µs once it has chosen."
        ),
    ]


def test_new_turns_are_compared_with_the_faster_kernel(results: Path) -> None:
    row = {"name": "(16, 8192, 16)", "plain_fa2_us": 150.0, "plain_fa3_us": 400.0, "ours_us": 75.0, "ours_error": 3e-3}
    (results / "gpu_append_h200.jsonl").write_text(f'{{"flashinfer": "0.7.2"}}\n{json.dumps(row)}\n', encoding="utf-8")
    assert _append().splitlines()[2:] == [f"| (16, 8192, 16) | 150.0 | 400.0 | 75.0 | 2.00{TIMES} | 3.0e-03 |"]


def test_steps_and_forks_are_told_in_milliseconds_and_microseconds() -> None:
    assert _steps(STEPS).splitlines()[2:] == [
        "| plain | 30.00 | 28.00 | 24.00 | 1.00 | 1.00 | 1.00 |",
        "| hybrid | 6.00 | 7.00 | 4.00 | 1.00 | 1.00 | 1.00 |",
        f"| plain over hybrid | 5.00{TIMES} | 4.00{TIMES} | 6.00{TIMES} | | | |",
    ]
    assert _forks(STEPS) == (
        "The tails of 64 forks, eight slots in 32 layers, take 40 µs in one launch, the copy of their places included "
        "(the slowest of 50: 42 µs); their bytes alone 32 µs."
    )


def test_blocks_of_graphs_are_compared_by_version_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts_report, "RESULTS", tmp_path)
    many, each, split = ({"blocks": way} for way in ("as flashinfer plans", "one for each sequence", "lists split"))
    rows = [
        step("plain", replay_us=43000.0, graph_us=35000.0) | many | {"flashinfer": "0.6.18", "batch": 256},
        step("hybrid", replay_us=9000.0, graph_us=7000.0) | many | {"flashinfer": "0.6.18", "batch": 256},
        step("plain", replay_us=36000.0, graph_us=35200.0) | each | {"flashinfer": "0.6.18", "batch": 256},
        step("plain", replay_us=36100.0, graph_us=35100.0) | each | {"flashinfer": "0.6.18", "batch": 256},
        step("plain", replay_us=36500.0, graph_us=35100.0) | split | {"flashinfer": "0.6.18", "batch": 256},
        step("plain", replay_us=9000.0, graph_us=8000.0) | each | {"flashinfer": "0.7.2", "batch": 64},
    ]
    (tmp_path / "gpu_step_h200_blocks.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert blocks_of_graphs().splitlines() == [
        "| flashinfer | sequences | kernels alone ms | as flashinfer plans | one for each sequence |",
        "|---|---:|---:|---:|---:|",
        "| 0.6.18 | 256 | 35.10 | 43.00 | 36.00 and 36.10 |",
        "| 0.7.2 | 64 | 8.00 |  | 9.00 |",
    ]
