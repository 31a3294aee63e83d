"""The GPU's part of docs/performance.md, made from the rows that `gpu_attention` and `gpu_step` left."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_parts_report import blocks_of_graphs, parts_of_steps, tries_of_steps
from benchmarks.gpu_promises import AGAINST_PLAIN, TIMES, Measured, gpu_promises, in_table
from benchmarks.table import RESULTS

if TYPE_CHECKING:
    from benchmarks.gpu_promises import Kept

__all__ = ["Recorded", "draw_gpu", "gpu_kept", "gpu_parts"]

Rows = list[dict[str, Any]]
#: the shapes drawn after the planner's constants had been fitted
FRESH, FRESH_UNEVEN = "h200_seed113", "h200_uneven127"
#: measured with an older flashinfer
OLDER = "h200_0618"
#: what a reader sees first: where it pays, and where it does not
SHORT = (
    "(256, 32768, 256)",
    "(1, 16384, 32, 2048, 128) for 256",
    "(256, 8192, 512)",
    "(2, 8192, 8, 8192, 512) for 128",
    "(16, 1024, 256)",
    "(64, 512, 2048)",
    "(64, 0, 2048)",
)


class Recorded:
    """One file of rows: what it was measured on, and the shapes."""

    def __init__(self, name: str) -> None:
        lines = (RESULTS / f"gpu_attention_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        self.about, *self.rows = map(json.loads, lines)

    @property
    def losses(self) -> list[float]:
        """How much longer ours took than the fastest choice measured, for each shape."""
        return [row["ours_us"] / min(row["choices"].values()) - 1 for row in self.rows]


def gpu_parts() -> dict[str, str]:
    """The parts of the page, by their names in the template."""
    known, fresh, ragged = Recorded("h200"), Recorded(FRESH), Recorded("h200_ragged")
    uneven, fresh_uneven, mixed = (Recorded(name) for name in ("h200_uneven", FRESH_UNEVEN, "h200_mixed"))
    about = known.about
    sm, memory = about["clocks MHz, SM and memory"]
    by_name = {row["name"]: row for row in known.rows}
    return {
        "gpu_machine": (
            f"One {about['device']} (up to {sm} MHz, memory {memory} MHz, driver {about['driver']}), "
            f"torch {about['torch']}, flashinfer {about['flashinfer']}, bfloat16, 32 query heads, 8 KV heads, "
            "head_dim 128, pages of 16, decode. "
            f"A copy within the device moved {about['copy TB/s']} TB/s, a matrix product ran at "
            f"{about['matrix TFLOP/s']} TFLOP/s."
        ),
        "gpu_command": "\n".join(
            f"    {found.about['command']}" for found in (known, fresh, ragged, uneven, fresh_uneven, mixed)
        ),
        "gpu_short": _table([by_name[name] for name in SHORT]),
        "gpu_promises": in_table(_promises()),
        "gpu_table": _table(known.rows),
        "gpu_fresh": _table(fresh.rows),
        "gpu_ragged": _table(ragged.rows),
        "gpu_uneven": _table(uneven.rows),
        "gpu_fresh_uneven": _table(fresh_uneven.rows),
        "gpu_mixed": _table(mixed.rows),
        "gpu_summary": _summary(known, fresh, ragged, uneven, fresh_uneven, mixed),
        "gpu_parts_of_steps": parts_of_steps(),
        "gpu_tries_of_steps": tries_of_steps(),
        "gpu_append": _append(),
        "gpu_older": _older(known, Recorded(OLDER), _recorded_steps(OLDER)),
        "gpu_blocks": blocks_of_graphs(),
        "gpu_steps": _steps(_recorded_steps()),
        "gpu_forks": _forks(_recorded_steps()),
    }


def gpu_kept() -> str:
    """How many promises are kept, in words."""
    promises = _promises()
    return f"{sum(promise.is_kept for promise in promises)} of {len(promises)}"


def _promises() -> list[Kept]:
    fresh, other = (
        [Recorded(name) for name in names]
        for names in ((FRESH, FRESH_UNEVEN), ("h200_ragged", "h200_uneven", "h200_mixed"))
    )
    heads = {"8 and 1 heads": Recorded("h200_8_1"), "32 and 32 heads": Recorded("h200_32_32")}
    measured = Measured(Recorded("h200"), fresh, other, heads)
    return gpu_promises(measured, Recorded("h200_float16"), _recorded_steps())


def _recorded_steps(name: str = "h200") -> Rows:
    return [json.loads(line) for line in (RESULTS / f"gpu_step_{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _table(rows: Rows) -> str:
    titles = (
        *("shape", "plain µs", "cascade µs", "ours µs", "against plain", "against cascade"),
        *("pages apart µs", "best measured µs", "ours over bound", "error"),
    )
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for row in rows:
        ours, choice = row["ours_us"], min(row["choices"], key=row["choices"].__getitem__)
        cells = [
            row["name"],
            f"{row['plain_us']:.1f}",
            f"{row['cascade_us']:.1f}",
            f"{ours:.1f}",
            f"{row['plain_us'] / ours:.2f}{TIMES}",
            f"{row['cascade_us'] / ours:.2f}{TIMES}",
            f"{row['scattered_us']:.1f}",
            f"{row['choices'][choice]:.1f} ({choice})",
            f"{ours / row['bound_us']:.2f}",
            f"{row['error']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _summary(
    known: Recorded, fresh: Recorded, ragged: Recorded, uneven: Recorded, fresh_uneven: Recorded, mixed: Recorded
) -> str:
    """What the planner loses, and where levels do not pay."""
    lines = []
    several = {
        f"the {len(known.rows)} shapes": known,
        f"{len(fresh.rows)} shapes of another seed, which it had never seen": fresh,
        f"the {len(ragged.rows)} ragged shapes": ragged,
        f"the {len(uneven.rows)} uneven shapes": uneven,
        f"{len(fresh_uneven.rows)} uneven shapes of another seed, likewise": fresh_uneven,
        f"the {len(mixed.rows)} mixed shapes": mixed,
    }
    for what, found in several.items():
        losses = found.losses
        worst = sorted(zip(losses, (row["name"] for row in found.rows), strict=True), reverse=True)[:3]
        named = ", ".join(f"{loss:.1%} at {name}" for loss, name in worst)
        plain = max(row["ours_us"] / row["plain_us"] - 1 for row in found.rows)
        lines.append(
            f"- On {what}: {max(0.0, statistics.median(losses)):.1%} longer than the best choice that was measured, in "
            f"the median; most: {named}. Than plain decode {max(0.0, plain):.1%} longer at most."
        )
    rows = [row for found in several.values() for row in found.rows]
    lowest, where = min((row["cascade_us"] / row["ours_us"], row["name"]) for row in rows)
    lines.append(
        f"- Ours is at least {lowest:.2f} times as fast as the cascade wrapper, on all {len(rows)} shapes (at {where})."
    )
    line = [row["scattered_us"] / row["ours_us"] for row in rows if "fa3 in line:" in " ".join(row["kernels"])]
    slower = [1 / ratio - 1 for ratio in line if ratio < 1]
    where = f"; in {len(slower)} of them it takes longer, by up to {max(slower):.0%}" if slower else ""
    lines.append(
        f"- Where a prompt that lies in one piece is read as one array ({len(line)} shapes), ours takes "
        f"{1 - 1 / statistics.median(line):.0%} less time than with its pages apart, in the median, and at most "
        f"{1 - 1 / max(line):.0%} less{where}."
    )
    planner = [row["planner_us"] + row["forest_us"] for row in known.rows if row["shape"][0] == 256]
    packs = [row["pack_us"] for row in known.rows if row["shape"][0] == 256]
    again = [row["planner_again_us"] for row in known.rows if row["shape"][0] == 256]
    lines.append(
        f"- Finding the shared runs and choosing takes the CPU {min(planner):.0f} to {max(planner):.0f} µs for a new "
        f"batch of 256, the choice alone {min(again):.0f} to {max(again):.0f} µs in the steps that follow. "
        f"`pack_hybrid`, from page tables to levels, takes {min(packs):.0f} to {max(packs):.0f} µs once it has chosen."
    )
    return "\n".join(lines)


def _append() -> str:
    """New turns over a shared prompt: the kernels that read it for each sequence, and levels."""
    lines = (RESULTS / "gpu_append_h200.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    titles = (
        "sequences, shared tokens, new tokens of each",
        "fa2 µs",
        "fa3 µs",
        "ours µs",
        "against the faster",
        "error",
    )
    table = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for row in map(json.loads, lines):
        plain, ours = [row["plain_fa2_us"], row["plain_fa3_us"]], row["ours_us"]
        times = " | ".join(f"{us:.1f}" for us in (*plain, ours))
        table.append(f"| {row['name']} | {times} | {min(plain) / ours:.2f}{TIMES} | {row['ours_error']:.1e} |")
    return "\n".join(table)


def _older(known: Recorded, older: Recorded, steps: Rows) -> str:
    """The promised shapes with two versions of flashinfer, and what holds of all shapes with the older one."""
    new, old = (str(found.about["flashinfer"]) for found in (known, older))
    titles = [
        "shape",
        *(f"{what}, {version}" for what in ("ours µs", "plain µs", "cascade µs") for version in (new, old)),
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    by_name = {row["name"]: row for row in known.rows}
    for row in older.rows:
        if row["name"] in AGAINST_PLAIN:
            pairs = ((by_name[row["name"]][us], row[us]) for us in ("ours_us", "plain_us", "cascade_us"))
            times = " | ".join(f"{found:.1f}" for pair in pairs for found in pair)
            lines.append(f"| {row['name']} | {times} |")
    cascade, behind = ([row[peer] / row["ours_us"] for row in older.rows] for peer in ("cascade_us", "plain_us"))
    slowest = 1 / min(behind) - 1
    lines.append(
        f"\nOn all {len(older.rows)} shapes ours is at least {min(cascade):.2f} times as fast as the cascade and "
        f"{f'at most {slowest:.1%} behind' if slowest > 0 else 'nowhere behind'} plain decode; errors are up to "
        f"{max(row['error'] for row in older.rows):.1e}. Whole steps of {steps[0]['layers']} layers:\n\n{_steps(steps)}"
    )
    return "\n".join(lines)


def _steps(steps: Rows) -> str:
    lines = [
        "| packing | eager ms | replay ms | graph ms | pack ms | plan ms | flashinfer's plans by hand ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    names = ("eager_us", "replay_us", "graph_us", "pack_us", "plan_us", "plan_by_hand_us")
    found = {row["packing"]: [row[name] for name in names] for row in steps if "packing" in row}
    for packing, values in found.items():
        lines.append(f"| {packing} | {' | '.join(f'{value / 1e3:.2f}' for value in values)} |")
    ratios = [plain / hybrid for plain, hybrid in zip(found["plain"], found["hybrid"], strict=True)][:3]
    lines.append(f"| plain over hybrid | {' | '.join(f'{ratio:.2f}{TIMES}' for ratio in ratios)} | | | |")
    return "\n".join(lines)


def _forks(steps: Rows) -> str:
    row = next(row for row in steps if "forks" in row)
    return (
        f"The tails of {row['forks']} forks, eight slots in {row['layers']} layers, take {row['us']:.0f} µs in one "
        f"launch, the copy of their places included (the slowest of 50: {row['slowest_us']:.0f} µs); their bytes alone "
        f"{row['bytes_us']:.0f} µs."
    )


def draw_gpu(folder: Path) -> None:
    """Writes two PNGs: decode attention beside plain decode and the cascade, of all shapes and of the fixed ones."""
    known, fresh = Recorded("h200").rows, Recorded(FRESH).rows
    _draw(known + fresh, folder / "gpu.png")
    _draw(known[:16], folder / "gpu_fixed.png")


def _draw(rows: Rows, path: Path) -> None:
    """A bar for each shape, by what is gained."""
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["plain_us"] / row["ours_us"])
    size = 8 if len(rows) < 20 else 7
    figure = Figure(figsize=(9, 1.7 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    gains = [row["plain_us"] / row["ours_us"] for row in rows]
    axes.barh(places, gains, color="#1b7f79", height=0.7, label="seqattn")
    cascade = [row["plain_us"] / row["cascade_us"] for row in rows]
    axes.plot(
        cascade, places, "|", color="#b7410e", markersize=9, markeredgewidth=2, label="flashinfer's cascade wrapper"
    )
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set(xscale="log", xlim=(0.2, 22), ylim=(-0.8, len(rows) - 0.2), xlabel="times as fast as plain decode")
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16], ["¼", "½", "1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.set_yticks(places, [_in_words(*row["shape"]) for row in rows], fontsize=size)
    for place, gain in zip(places, gains, strict=True):
        axes.text(max(gain, 1) * 1.04, place, f"{gain:.1f}", va="center", fontsize=size)
    figure.suptitle(
        "Decode attention of one layer on an H200\n"
        "256: 8,192 + 512 is 256 sequences that share 8,192 tokens and have 512 of their own each;\n"
        f"128: 2 {TIMES} 8,192, 8 {TIMES} 8,192 each + 512 has two prompts, and on each of them eight documents",
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _in_words(batch: int, systems: int, system_len: int, documents: int, document_len: int, own_len: int) -> str:
    """A shape as the pictures name it; the tables have the same numbers."""
    shared = f"{system_len:,}" if systems == 1 else f"{systems} {TIMES} {system_len:,}"
    if document_len:
        shared += f", {documents} {TIMES} {document_len:,}" + ("" if systems == 1 else " each")
    return f"{batch}: {shared} + {own_len:,}"
