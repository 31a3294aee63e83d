"""Batches that `benchmarks.gpu_attention` measured in every way, from their recorded rows; runs without a GPU."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve

from benchmarks.gpu_shapes import LONG, PAGE_SIZE, Shape, tables_of
from seqattn.device import Device
from seqattn.fit import Measured
from seqattn.forest import build_forest, depths_of
from seqattn.groups import groups_of
from seqattn.load import Groups, Heads, is_short

__all__ = ["RESULTS", "RecordedBatch", "depths_in", "recorded"]

RESULTS = Path(__file__).parent / "results"


def recorded(name: str) -> list[dict[str, Any]]:
    """The rows of `gpu_attention_h200<name>.jsonl`, each with what its file says of all."""
    text = (RESULTS / f"gpu_attention_h200{name}.jsonl").read_text(encoding="utf-8")
    about, *rows = map(json.loads, text.splitlines())
    how = {key: about.get(key, False) for key in ("in_line", "ragged", "uneven", "mixed")}
    more = {"seed": about["seed"], "how": how, "heads": tuple(about["heads"]), "as_now": "short_lists" in about}
    return [row | more | _choices(row) | {"id": f"{row['name']}{name}"} for row in rows]


def _choices(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The times of a row's choices apart: those of the forest, and those with long lists in levels."""
    found = row["choices"].items()
    return {
        "choices": {name: us for name, us in found if not name.startswith(LONG)},
        "long": {name.removeprefix(LONG): us for name, us in found if name.startswith(LONG)},
    }


class RecordedBatch:
    """The batch of a row.

    Attributes:
        row: the row, as `recorded` has it.
        lens: tokens of each sequence, int64 [batch].
        before: query rows before each position of the order, int64 [batch + 1]: one for each sequence.
        runs: the forest's.
        depths: of each run.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row
        tables = tables_of(Shape(*row["shape"]), row["seed"], **row["how"])
        self.lens = np.array([len(table) * PAGE_SIZE for table in tables])
        self.before = np.arange(len(tables) + 1)
        _, self.runs = build_forest(tables, ((self.lens - 1) // PAGE_SIZE).tolist())
        self.depths = depths_of(self.runs)

    @property
    def is_as_now(self) -> bool:
        """Whether every last level was computed by the kernel that it would be computed by now.

        Short lists were once told by their mean.
        """
        if self.row["as_now"]:
            return True
        heads, num_processors = Heads(*self.row["heads"]), Device().num_processors
        for kept in {frozenset(depths_in(name)) for name in self.row["choices"]}:
            last = self.levels(kept, in_line=False)[-1]
            count, longest, total = len(last.rows), int(last.tokens.max()), int(last.tokens.sum())
            if (count >= 16 and total <= 176 * count) != is_short(heads, num_processors, count, longest, total):
                return False
        return True

    def steps(self, *, in_line: bool, alone: bool = False, batch: int = 0) -> list[Measured]:
        """Every way that was measured.

        Args:
            in_line: prompts lie in one piece.
            alone: as if no two sequences had pages of the last level in common, which is what kernels are chosen by.
            batch: the number to give it.
        """
        return [
            Measured(batch, *self._levels_and_slices(name, in_line=in_line, alone=alone), us)
            for name, us in self.row["choices"].items()
        ]

    def levels(self, kept: Collection[int], *, in_line: bool) -> list[Groups]:
        """The groups of each level if runs of these depths are kept."""
        mask = [depth in kept for depth in self.depths]
        *shared, last = groups_of(self.runs, mask, self.before, self.lens, page_size=PAGE_SIZE)
        return [*(evolve(groups, in_line=in_line and len(groups.rows) == 1) for groups in shared), last]

    def _levels_and_slices(self, name: str, *, in_line: bool, alone: bool) -> tuple[list[Groups], list[int]]:
        ways = [] if name == "plain" else [part.split(":")[1] for part in name.split("+")]
        slices = [int(way[4:]) if way.startswith("fa3") else 0 for way in ways]
        *shared, last = self.levels(depths_in(name), in_line=in_line)
        last = evolve(last, num_different=int(last.tokens.sum())) if alone else last
        return [*shared, last], slices


def depths_in(name: str) -> list[int]:
    """The depths that are levels in a way to compute a batch, by its name."""
    return [] if name == "plain" else [int(part.split(":")[0]) for part in name.split("+")]
