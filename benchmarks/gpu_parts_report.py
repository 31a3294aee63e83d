"""The tables of a step's parts in docs/performance.md, made from the rows that `gpu_parts` and `gpu_step` left."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.table import RESULTS

__all__ = ["RUNS", "blocks_of_graphs", "fastest", "parts_of_steps", "tries_of_steps"]

#: recorded runs of `gpu_parts`: the one that the first table shows, an earlier, a later, and one with flashinfer 0.6.18
RUNS = ("h200", "h200_first", "h200_third", "h200_0618")
#: ways that are told of in all runs, by their names on the page; None: as planned, which is among those tried, too
_WAYS = {
    "as planned, measured again": None,
    "merging early": "merging early",
    "the same, behind level 0": "merging early behind level 0",
    "gathering early": "gathering early",
    "one priority": "one priority",
    "begun at once": "begun at once",
    "last level first": "last level first",
    "three slices": "level 0: fa3x3",
    "level 1 by fa3": "level 1: fa3x1",
}


def parts_of_steps() -> str:
    """A line for each step near the serial bound: what its kernels take, and the fastest way of all tried."""
    titles = (
        *("shape", "bound µs", "ours µs", "hot µs", "in turn µs"),
        *("each level alone µs (its share of the bound)", "around µs", "empty replay µs", "fastest way µs"),
    )
    table = [f"| {' | '.join(titles)} |", "|---" + "|---:" * 4 + "|---" + "|---:" * 2 + "|---|"]
    for row in _recorded(RUNS[0]):
        times = {name: statistics.median(us) for name, us in row["parts"].items()}
        levels = ", ".join(
            f"{level['kernel']} {times[f'level {i} alone']:.0f} ({level['pages_us'] + level['matrix_us']:.0f})"
            for i, level in enumerate(row["levels"])
        )
        cells = [
            *(f"{us:.1f}" for us in (row["bound_us"], times["ours"], row["hot_us"], times["in turn"])),
            levels,
            *(f"{us:.1f}" for us in (times["around"], row["replay_us"])),
            fastest(row),
        ]
        table.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(table)


def fastest(row: dict[str, Any]) -> str:
    """The way of all tried that took the least time; as planned where none was faster each time."""
    ours = row["parts"]["ours"]
    others = {name: us for name, us in row["tried"].items() if name not in row["planned"]}
    faster = [(statistics.median(us), name) for name, us in others.items() if max(us) < min(ours)]
    us, name = min(faster, default=(statistics.median(ours), "as planned"))
    return f"{us:.1f} ({name})"


def tries_of_steps() -> str:
    """A line for each way: by how much longer than planned a step took, the least and the most of all runs."""
    runs = [_recorded(name) for name in RUNS]
    table = [f"| % | {' | '.join(row['name'] for row in runs[0])} |", "|---" + "|---:" * len(runs[0]) + "|"]
    for what, name in _WAYS.items():
        cells = []
        for rows in zip(*runs, strict=True):
            changes = [round(found, 1) + 0.0 for found in (_change(row, name) for row in rows) if found is not None]
            cells.append(f"{min(changes)} to {max(changes)}" if changes else "")
        table.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(table)


def blocks_of_graphs() -> str:
    """A line for each version of flashinfer and size of a batch: steps of plain decode with both numbers of blocks."""
    lines = (RESULTS / "gpu_step_h200_blocks.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["packing"] == "plain"]
    ways = ("as flashinfer plans", "one for each sequence")
    table = [f"| flashinfer | sequences | kernels alone ms | {' | '.join(ways)} |", "|---" + "|---:" * 4 + "|"]
    for version, batch in dict.fromkeys((row["flashinfer"], row["batch"]) for row in rows):
        here = [row for row in rows if (row["flashinfer"], row["batch"]) == (version, batch)]
        alone = statistics.median(row["graph_us"] for row in here) / 1e3
        replays = [
            " and ".join(f"{row['replay_us'] / 1e3:.2f}" for row in here if row["blocks"] == way) for way in ways
        ]
        table.append(f"| {version} | {batch} | {alone:.2f} | {' | '.join(replays)} |")
    return "\n".join(table)


def _change(row: dict[str, Any], way: str | None) -> float | None:
    """By how many percent a way of `_WAYS` took longer than what was planned; None if it was that, or was not tried."""
    if way is None:
        way = next(name for name in row["planned"] if name in row["tried"])
    elif way in row["planned"] or way not in row["tried"]:
        return None
    median, planned = statistics.median(row["tried"][way]), statistics.median(row["parts"]["ours"])
    return 100 * (float(median) / float(planned) - 1)


def _recorded(name: str) -> list[dict[str, Any]]:
    lines = (RESULTS / f"gpu_parts_{name}.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line) for line in lines]
