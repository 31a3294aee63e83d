"""What the benchmark of a step's parts runs and counts; without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from attrs import define

from benchmarks import gpu_parts
from benchmarks.gpu_attention import Step
from benchmarks.gpu_by_hand import NUM_LAYERS
from benchmarks.gpu_promises import OVER_BOUND
from benchmarks.gpu_shapes import KNOWN, PAGE_SIZE, Shape, tables_of
from seqattn.forest import build_forest
from seqattn.hybrid import pack_hybrid

COPY = 4e12
#: two prompts, two documents on each, two sequences on each document
SHAPE = Shape(8, 2, 64, 2, 32, 16)


@define(frozen=True)
class Prepared:
    work: Any
    runs: list[tuple[Any, Any]]


class Fake:
    """A step whose kernels note that they ran; stands for `Step` and for its attention."""

    def __init__(self, shape: Shape = SHAPE) -> None:
        self.shape, self.num_qo_heads, self.q = shape, 32, None
        self.manager = SimpleNamespace(head_dim=128)
        self.tables = tables_of(shape, 0)
        self.lens = np.array([len(table) * PAGE_SIZE for table in self.tables], dtype=np.int64)
        self.forest = build_forest(self.tables, ((self.lens - 1) // PAGE_SIZE).tolist())
        self.bytes = len(np.unique(np.concatenate(self.tables))) * PAGE_SIZE * 8 * 128 * 4
        self.cost_model, self.overlap, self.ran = None, True, list[Any]()
        self.attention: Any = self
        self._impl = self

    def packed(self, cost_model: None) -> Any:  # noqa: ANN401  as `Step`'s
        return pack_hybrid(self.tables, self.lens, page_size=PAGE_SIZE, query_lens=None, cost_model=cost_model)

    def plan(self, data: Any) -> None:  # noqa: ANN401
        calls = [SimpleNamespace(kind=(f"k{i}",), kv_last_page_len=range(3)) for i in range(len(data.levels))]
        runs = [(None, lambda i=i: self.ran.append(i)) for i in range(len(calls))]
        self._prepared = Prepared(SimpleNamespace(calls=calls), runs)

    def work_us(self, rates: dict[str, float]) -> float:
        return Step.work_us(self, rates)  # type: ignore[arg-type]

    def _run_call(self, _q: None, _layer: int, prepared: Prepared, i: int) -> None:
        prepared.runs[i][1]()

    def layers(self) -> None:
        for layer in range(NUM_LAYERS):
            self.ran.append("around" if self.overlap else "around, in turn")
            for i in range(len(self._prepared.runs)):
                self._run_call(None, layer, self._prepared, i)


def test_the_least_of_all_levels_is_the_bound() -> None:
    step: Any = Fake()
    levels = step.packed(None).levels
    assert len(levels) == 3
    least = [gpu_parts.least_us(level, step, COPY, is_last=i == 2) for i, level in enumerate(levels)]
    assert [round(pages * COPY / 1e6) for pages, _ in least] == [
        4 * 8 * 128 * tokens for tokens in (2 * 64, 4 * 32, 8 * 16)
    ]
    assert least[2][1] == 0
    assert sum(map(sum, least)) == pytest.approx(step.work_us({"copy": COPY}))


def test_each_part_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Fake()
    timed: list[list[Any]] = []

    def once(layers: Any, num_layers: int) -> tuple[float, float]:  # noqa: ANN401  a function of no arguments
        step.ran.clear()
        layers()
        assert not len(step.ran) % num_layers
        timed.append(step.ran[: len(step.ran) // num_layers])
        assert step.ran == timed[-1] * num_layers
        return float(len(timed)), 0.0

    monkeypatch.setattr(gpu_parts, "device_us", once)
    monkeypatch.setattr(gpu_parts, "copy_rate", lambda: COPY)
    monkeypatch.setattr(gpu_parts, "Step", lambda *_: step)
    monkeypatch.setattr(gpu_parts, "KNOWN", [step.shape])
    monkeypatch.setattr(gpu_parts, "OVER_BOUND", {str(step.shape): 1.2})
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu_parts.py", "--out", str(tmp_path)])
    gpu_parts.main()
    assert timed == [["around", 0, 1, 2], ["around, in turn", 0, 1, 2], ["around"], [0], [1], [2], ["around", 0, 1, 2]]
    about, row = map(json.loads, (tmp_path / "parts.jsonl").read_text(encoding="utf-8").splitlines())
    assert about.items() >= {"copy TB/s": 4.0, "command": "python -m benchmarks.gpu_parts --out DIR"}.items()
    assert [row[name] for name in ("ours_us", "in_turn_us", "around_us", "ours_again_us")] == [1, 2, 3, 7]
    assert [(level["kernel"], level["us"]) for level in row["levels"]] == [("k0:3", 4), ("k1:3", 5), ("k2:3", 6)]


def test_every_shape_with_a_promised_bound_is_measured() -> None:
    assert OVER_BOUND.keys() <= {str(shape) for shape in KNOWN}
