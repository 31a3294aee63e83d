"""How cost grows: log-log pictures over tokens, leaves, batch and pages."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import sizes_of
from benchmarks.impls import IMPLS
from benchmarks.rows import Row

__all__ = ["draw_all"]

COLOURS = {
    "ours": "#1b7f79",
    "ours-whole-pages": "#1b7f79",
    "ours-history": "#6fb3ae",
    "sglang-rust": "#b7410e",
    "sglang-classic": "#d9a066",
    "vllm": "#4b5fa8",
    "seqattn-0.0.2": "#8a8a8a",
}


class Panel(NamedTuple):
    """One pair of axes.

    Attributes:
        title: what is shown.
        script: whose rows.
        measures: one line for each implementation and each of these.
        axis: the option along the horizontal axis; rows differ from the script's defaults in it alone.
        given: other options that differ from the defaults.
    """

    title: str
    script: str
    measures: tuple[str, ...]
    axis: str
    given: tuple[tuple[str, Any], ...] = ()


PICTURES = {
    "tokens": (
        Panel("match, everything cached", "match", ("match",), "tokens"),
        Panel("insert, nothing cached", "insert", ("insert",), "tokens"),
        Panel("a whole new request", "insert", ("request",), "tokens"),
    ),
    "leaves": (
        Panel("evict(1)", "evict", ("evict",), "leaves"),
        Panel("start a request of one page, evicting one", "evict", ("allocation",), "leaves"),
    ),
    "batch": (
        Panel("pack, 2,048 pages a sequence", "pack", ("pack", "again, tables grown", "again, same tables"), "batch"),
    ),
    "pages": (
        Panel("allocate and release", "allocate", ("allocate and release",), "pages"),
        Panel("pack 64 sequences", "pack", ("pack", "again, same tables"), "pages", (("batch", 64),)),
    ),
}

STYLES = ("o-", "s--", "^:")


def draw_all(rows: Sequence[Row], folder: Path) -> None:
    """Writes a PNG for each entry of `PICTURES`."""
    from matplotlib.figure import Figure

    for name, panels in PICTURES.items():
        figure = Figure(figsize=(1 + 4 * len(panels), 3.8), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, panel, rows)
        figure.savefig(folder / f"{name}.png", dpi=110)


def _draw(axes: Any, panel: Panel, rows: Sequence[Row]) -> None:  # noqa: ANN401  matplotlib's own
    """Medians over rounds; the shade is from the lowest to the highest."""
    for (impl, measure), points in sorted(_points(panel, rows).items()):
        sizes = sorted(points)
        label = IMPLS[impl].title + (f": {measure}" if len(panel.measures) > 1 else "")
        style, colour = STYLES[panel.measures.index(measure)], COLOURS[impl]
        axes.plot(sizes, [statistics.median(points[n]) for n in sizes], style, label=label, color=colour, markersize=4)
        axes.fill_between(
            sizes, [min(points[n]) for n in sizes], [max(points[n]) for n in sizes], color=colour, alpha=0.2
        )
    axes.set(xscale="log", yscale="log", xlabel=panel.axis, ylabel="CPU time, µs", title=panel.title)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=7)


def _points(panel: Panel, rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(implementation, measure) → size → a median for each round."""
    usual = sizes_of(panel.script) | dict(panel.given)
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        fits = row["script"] == panel.script and row["measure"] in panel.measures
        if fits and row["options"] | {panel.axis: usual[panel.axis]} == usual:
            found[row["impl"], row["measure"]][row["options"][panel.axis]].append(row["median"])
    return found
