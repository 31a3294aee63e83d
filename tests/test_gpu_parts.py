"""What the benchmark of a step's parts runs and counts; without a GPU."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from attrs import define

from benchmarks import gpu_parts, gpu_parts_report, gpu_timing
from benchmarks.gpu_about import watched
from benchmarks.gpu_attention import Step
from benchmarks.gpu_by_hand import NUM_LAYERS
from benchmarks.gpu_parts_report import RUNS, _recorded, fastest, parts_of_steps, tries_of_steps
from benchmarks.gpu_promises import OVER_BOUND
from benchmarks.gpu_shapes import KNOWN, PAGE_SIZE, Shape, tables_of
from benchmarks.gpu_timing import REPEATS
from seqattn.attention.calls import Choice
from seqattn.forest import build_forest
from seqattn.hybrid import pack_hybrid

COPY = 4e12
#: two prompts, two documents on each, two sequences on each document
SHAPE = Shape(8, 2, 64, 2, 32, 16)
PLANNED = [Choice("fa3", 2), Choice("fa2"), Choice("decode")]
ROW_TIMES = {
    "ours": [10.0, 10.5, 10.2],
    "slower": [11.0, 9.9, 11.0],
    "faster": [9.0, 9.8, 9.1],
    "little": [9.9] * 3,
    "as it is": [9.8] * 3,
}


@define(frozen=True)
class Prepared:
    work: Any


@define(slots=True)
class Stream:
    """Stands for a stream: notes what it waits for, and what is launched on it."""

    name: str
    ran: list[Any]

    def wait_stream(self, other: Stream) -> None:
        self.ran.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def used(self) -> Iterator[None]:
        self.ran.append(f"on {self.name}")
        yield
        self.ran.append(f"no longer on {self.name}")


class Fake:
    """A step that notes what it launches; stands for `Step` and for all that it has."""

    def __init__(self, shape: Shape = SHAPE) -> None:
        self.shape, self.num_qo_heads, self.q = shape, 32, torch.zeros(shape.batch, 32, 128)
        self.manager = SimpleNamespace(head_dim=128)
        self.tables = tables_of(shape, 0)
        self.lens = np.array([len(table) * PAGE_SIZE for table in self.tables], dtype=np.int64)
        self.forest = build_forest(self.tables, ((self.lens - 1) // PAGE_SIZE).tolist())
        self.bytes = len(np.unique(np.concatenate(self.tables))) * PAGE_SIZE * 8 * 128 * 4
        self.cost_model, self.overlap, self.ran = None, True, list[Any]()
        self.attention: Any = self
        self._impl = self
        self._launcher: Any = None
        self._streams = SimpleNamespace(
            _sides=[Stream(name, self.ran) for name in ("high", "low")],
            _pause=SimpleNamespace(zero_=lambda: self.ran.append("pause")),
        )
        self.gathers_early = self.merges_early = False

    def packed(self, cost_model: None) -> Any:  # noqa: ANN401  as `Step`'s
        return pack_hybrid(self.tables, self.lens, page_size=PAGE_SIZE, query_lens=None, cost_model=cost_model)

    def plan(self, data: Any) -> None:  # noqa: ANN401
        self.choose(data, PLANNED)

    def choose(self, data: Any, choices: list[Choice]) -> None:  # noqa: ANN401
        calls = [
            SimpleNamespace(
                kernel=choice.kernel,
                kind=(choice.kernel,),
                kv_last_page_len=range(choice.slices * (len(level.qo_indptr) - 1)),
                choice=choice,
            )
            for choice, level in zip(choices, data.levels, strict=True)
        ]
        self._prepared = Prepared(SimpleNamespace(calls=calls))

    def work_us(self, rates: dict[str, float]) -> float:
        return Step.work_us(self, rates)  # type: ignore[arg-type]

    def layers(self) -> None:
        if self._launcher is None:  # as that of the backend, it is there once something has run
            self._launcher = SimpleNamespace(
                gather_queries=lambda: self.ran.append(("gather", self.gathers_early)),
                merge_parts=lambda: self.ran.append(("merge", self.merges_early)),
            )
        for layer in range(NUM_LAYERS):
            self._run_parts(self.q, layer, self._prepared, ())

    def _run_parts(self, q: torch.Tensor, layer: int, prepared: Prepared, _results: tuple[()]) -> None:
        self._launcher.gather_queries()
        if self.overlap:
            self._streams._pause.zero_()
            self.ran.append(tuple(side.name for side in self._streams._sides))
        for i in range(len(prepared.work.calls)):
            self._run_call(q, layer, prepared, i)
        self._launcher.merge_parts()

    def _run_call(self, q: torch.Tensor, layer: int, prepared: Prepared, i: int) -> None:
        assert q is self.q
        assert 0 <= layer < NUM_LAYERS
        self.ran.append((i, prepared.work.calls[i].choice))


def test_the_shares_of_all_levels_are_the_bound() -> None:
    step: Any = Fake()
    levels = step.packed(None).levels
    assert len(levels) == 3
    shares = [gpu_parts.share_us(level, step, COPY, is_last=i == 2) for i, level in enumerate(levels)]
    assert [round(pages * COPY / 1e6) for pages, _ in shares] == [
        4 * 8 * 128 * tokens for tokens in (2 * 64, 4 * 32, 8 * 16)
    ]
    assert shares[2][1] == 0
    assert sum(map(sum, shares)) == pytest.approx(step.work_us({"copy": COPY}))


def ran_by_each_way() -> dict[str, list[Any]]:
    """What one layer launches."""
    sides, calls, gather, merge = ("high", "low"), list(enumerate(PLANNED)), ("gather", False), ("merge", False)
    gather_early, merge_early = ("gather", True), ("merge", True)

    def around(calls: list[Any], sides: tuple[str, str] = sides) -> list[Any]:
        return [gather, "pause", sides, *calls, merge]

    def instead(i: int, n: int) -> list[Any]:
        return around([*calls[:i], (i, Choice("fa3", n)), *calls[i + 1 :]])

    return {
        "ours": around(calls),
        "in turn": [gather, *calls, merge],
        "level 0 alone": calls[:1],
        "level 1 alone": calls[1:2],
        "level 2 alone": calls[2:],
        "around": around([]),
        "without gathering": around(calls)[1:],
        "without merging": around(calls)[:-1],
        "begun at once": [gather, *around(calls)[2:]],
        "one priority": around(calls, ("any", "any")),
        "last level first": around(calls[::-1]),
        "gathering early": [gather_early, *around(calls)[1:]],
        "merging early": [*around(calls)[:-1], merge_early],
        "both early": [gather_early, *around(calls)[1:-1], merge_early],
        "merging early behind level 0": [
            *around(calls)[:-1],
            *("high waits for main", "on high", merge_early, "no longer on high", "main waits for high"),
        ],
        **{f"level 0: fa3x{n}": instead(0, n) for n in range(1, 9)},
        **{f"level 1: fa3x{n}": instead(1, n) for n in (1, 2)},
    }


def test_each_way_launches_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Fake()
    timed: list[list[Any]] = []
    pauses: list[float] = []

    def replay_times(layers: Any, repeats: int) -> list[float]:  # noqa: ANN401  a function of no arguments
        step.ran.clear()
        layers()
        one = step.ran[: -(-len(step.ran) // NUM_LAYERS)]
        assert step.ran in (one * NUM_LAYERS, one)
        timed.append(one)
        return [0.0] * (repeats - REPEATS) + [float(len(timed) * NUM_LAYERS)] * REPEATS

    monkeypatch.setattr(gpu_timing, "replay_times", replay_times)
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(gpu_parts, "copy_rate", lambda: COPY)
    monkeypatch.setattr(gpu_parts, "Step", lambda *_: step)
    monkeypatch.setattr(gpu_parts, "KNOWN", [step.shape])
    monkeypatch.setattr(gpu_parts, "OVER_BOUND", {str(step.shape): 1.2})
    monkeypatch.setattr(gpu_parts, "watched", FakeWatch)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("any", step.ran))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main", step.ran))
    monkeypatch.setattr(torch.cuda, "stream", Stream.used)
    early = {
        "gathering_early": lambda: patch.multiple(step, gathers_early=True),
        "merging_early": lambda: patch.multiple(step, merges_early=True),
    }
    monkeypatch.setitem(sys.modules, "benchmarks.gpu_early", SimpleNamespace(**early))
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu_parts.py", "--out", str(tmp_path)])
    gpu_parts.main()
    about, row = map(json.loads, (tmp_path / "parts.jsonl").read_text(encoding="utf-8").splitlines())
    assert about.items() >= {"copy TB/s": 4.0, "command": "python -m benchmarks.gpu_parts --out DIR"}.items()

    expected = ran_by_each_way()
    each_round = [["pause"], *expected.values()]
    assert timed == [*each_round * gpu_parts.ROUNDS, expected["ours"]]
    assert pauses == [gpu_parts.PAUSE_S] * (len(timed) - 1)
    assert row["replay_us"] == 1 + len(each_round), "the median of its rounds"
    assert row["parts"] | row["tried"] == {
        name: [1 + nth + i * len(each_round) for i in range(gpu_parts.ROUNDS)]
        for nth, name in enumerate(expected, start=1)
    }
    assert [*row["tried"]] == [*expected][8:]
    assert (row["hot_us"], row["hot_mhz"], row["hot_watts"]) == (len(timed), 1500, 690)
    assert [level["kernel"] for level in row["levels"]] == ["fa3:4", "fa2:4", "decode:8"]
    assert row["planned"] == ["level 0: fa3x2", "level 1: fa2x1", "level 2: decodex1"]
    assert vars(step).keys() == vars(Fake()).keys() | {"_prepared"}, "all is as it was"


class FakeWatch:
    """Stands for `watched`."""

    def __init__(self, query: str) -> None:
        assert query == "clocks.sm,power.draw"
        self.seen: list[list[float]] = []

    def __enter__(self) -> list[list[float]]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.seen += [[1980, 400], [1500, 650], [1700, 690]]


def test_hot_times_are_those_after_a_second_and_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    def replay_times(layers: str, repeats: int) -> list[float]:
        assert (layers, repeats - REPEATS) == ("layers", 3750)
        return [100.0 * NUM_LAYERS] * 3750 + [110.0 * NUM_LAYERS] * REPEATS

    monkeypatch.setattr(gpu_timing, "replay_times", replay_times)
    monkeypatch.setattr(gpu_parts, "watched", FakeWatch)
    assert gpu_parts.hot("layers", 100.0) == {"hot_us": 110, "hot_mhz": 1500, "hot_watts": 690}  # type: ignore[arg-type]


SAYS = """#!/bin/sh
echo "$*" >> {asked}
case "$*" in *--id={device}*) ;; *) echo "No devices were found"; exec sleep 60;; esac
echo "1980, 120.5"
echo "1500, 690.25"
echo "1700, [N/A]"
printf "19"
echo > {asked}.said
exec sleep 60
"""


@pytest.mark.parametrize(
    ("device", "asked", "seen"),
    [("GPU-12-ab", 1, [[1500, 690.25]]), ("1", 2, [[1500, 690.25]]), ("another", 2, [])],
    ids=["by name", "by number", "unknown"],
)
def test_a_device_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, asked: int, seen: list[list[float]]
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(SAYS.format(asked=tmp_path / "asked", device=device), encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-ab"))
    begun = time.monotonic()
    with watched("clocks.sm,power.draw", every_ms=20) as found:
        assert not found
        while seen and not (tmp_path / "asked.said").exists() and time.monotonic() - begun < 40:
            time.sleep(0.01)
    assert found == seen
    assert time.monotonic() - begun < 50, "no process was waited for to the end of its 60 seconds"
    lines = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert len(lines) == asked
    assert all("--query-gpu=clocks.sm,power.draw" in line and "--loop-ms=20" in line for line in lines)


def test_what_nvidia_smi_does_not_say_of_hot_steps_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "device_us", lambda *_, warm_ups: (120.5, 0.0))
    monkeypatch.setattr(gpu_parts, "watched", lambda _: nullcontext([]))
    assert gpu_parts.hot(list, 100.0) == {"hot_us": 120.5, "hot_mhz": None, "hot_watts": None}


def test_without_nvidia_smi_nothing_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    with watched("power.draw") as found:
        pass
    assert found == []


def test_every_shape_with_a_promised_bound_is_measured() -> None:
    assert OVER_BOUND.keys() <= {str(shape) for shape in KNOWN}


# -- what the page says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tried", "told"),
    [
        (["slower", "faster"], "9.1 (faster)"),
        (["slower"], "10.2 (as planned)"),
        (["little", "faster", "slower"], "9.1 (faster)"),
        (["slower", "little"], "9.9 (little)"),
        (["slower", "as it is"], "10.2 (as planned)"),
        ([], "10.2 (as planned)"),
    ],
    ids=[
        "one is faster",
        "within the noise",
        "the fastest of two",
        "a little faster",
        "the planned way again",
        "none tried",
    ],
)
def test_a_way_is_faster_if_its_slowest_time_is(tried: list[str], told: str) -> None:
    parts = {"ours": ROW_TIMES["ours"], "around": [1.0] * 3}
    row = {"planned": ["as it is"], "parts": parts, "tried": {name: ROW_TIMES[name] for name in tried}}
    assert fastest(row) == told


@pytest.mark.parametrize("run", RUNS)
def test_recorded_steps_are_near_the_bound_hot_and_near_the_fastest_way_tried(run: str) -> None:
    rows = _recorded(run)
    assert {row["name"] for row in rows} == set(OVER_BOUND)
    for row in rows:
        ours = statistics.median(row["parts"]["ours"])
        assert max(ours, row["hot_us"]) <= OVER_BOUND[row["name"]] * row["bound_us"]
        shares = sum(level["pages_us"] + level["matrix_us"] for level in row["levels"])
        assert shares == pytest.approx(row["bound_us"], rel=2e-3), "the shares of all levels are the bound"
        assert ours <= 1.08 * min(map(statistics.median, row["tried"].values()))


def test_the_table_has_a_line_for_each_row() -> None:
    title, _, *lines = parts_of_steps().splitlines()
    assert title.count("|") == lines[0].count("|")
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [row["name"] for row in _recorded(RUNS[0])]


def test_other_ways_are_told_by_how_much_longer_they_took_in_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, slices = ["level 0: fa3x2", "level 1: decodex1"], "level 0: fa3x3"
    tried = [
        {"merging early": [99.0, 98.0, 120.0], planned[0]: [100.0] * 3, slices: [90.0] * 3},
        {"merging early": [99.98] * 3, planned[0]: [101.0] * 3, slices: [80.0] * 3},
        {planned[0]: [102.0] * 3, slices: [130.0] * 3},
    ]
    planned_so = [planned, planned, ["level 0: fa2x1", slices]]
    for name, ways, plan in zip(RUNS, tried, planned_so, strict=False):
        row = {
            "name": "(4, 64, 16)",
            "planned": [*plan, planned[0]],
            "parts": {"ours": [1.0, 100.0, 500.0]},
            "tried": ways,
        }
        (tmp_path / f"gpu_parts_{name}.jsonl").write_text(f"{{}}\n{json.dumps(row)}\n", encoding="utf-8")
    monkeypatch.setattr(gpu_parts_report, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_parts_report, "RUNS", RUNS[:3])
    lines = tries_of_steps().splitlines()
    assert lines[:4] == [
        "| % | (4, 64, 16) |",
        "|---|---:|",
        "| as planned, measured again | 0.0 to 30.0 |",
        "| merging early | -1.0 to 0.0 |",
    ]
    assert "| three slices | -20.0 to -10.0 |" in lines, "where they are not what is planned"
    assert "| level 1 by fa3 |  |" in lines
