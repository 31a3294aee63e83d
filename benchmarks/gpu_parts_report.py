"""The table of a step's parts in docs/performance.md, made from the rows that `gpu_parts` left."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.table import RESULTS

__all__ = ["fastest", "parts_of_steps"]


def parts_of_steps() -> str:
    """A line for each step near the serial bound: what its kernels take, and the fastest way of all tried."""
    lines = (RESULTS / "gpu_parts_h200.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    titles = (
        *("shape", "bound µs", "ours µs", "hot µs", "in turn µs"),
        *("each level alone µs (its share of the bound)", "around µs", "empty replay µs", "fastest way µs"),
    )
    table = [f"| {' | '.join(titles)} |", "|---" + "|---:" * 4 + "|---" + "|---:" * 2 + "|---|"]
    for row in map(json.loads, lines):
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
