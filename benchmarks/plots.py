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
        label: what stands under the axis; the option's name if it is empty.
    """

    title: str
    script: str
    measures: tuple[str, ...]
    axis: str
    given: tuple[tuple[str, Any], ...] = ()
    label: str = ""


PICTURES = {
    "tokens": (
        Panel("match, everything cached", "match", ("match",), "tokens"),
        Panel("insert, nothing cached", "insert", ("insert",), "tokens"),
        Panel("a whole new request", "insert", ("request",), "tokens"),
    ),
    "leaves": (
        Panel("evict one page", "evict", ("evict",), "leaves", label="idle leaves"),
        Panel("start a request of one page, evicting one", "evict", ("allocation",), "leaves", label="idle leaves"),
    ),
    "batch": (
        Panel(
            "pack, 2,048 pages a sequence",
            "pack",
            ("pack", "again, tables grown", "again, same tables"),
            "batch",
            label="sequences in the batch",
        ),
    ),
    "pages": (
        Panel("allocate and release", "allocate", ("allocate and release",), "pages"),
        Panel(
            "pack 64 sequences",
            "pack",
            ("pack", "again, same tables"),
            "pages",
            (("batch", 64),),
            label="pages of each sequence",
        ),
    ),
}

STYLES = ("o-", "s--", "^:")


def draw_all(rows: Sequence[Row], folder: Path) -> None:
    """Writes a PNG for each entry of `PICTURES`."""
    from matplotlib.figure import Figure

    for name, panels in PICTURES.items():
        figure = Figure(figsize=(2 + 4 * len(panels), 4.6), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, panel, rows)
        figure.supxlabel(
            "lines: medians over rounds; shades, and bars of lone points: from the lowest to the highest", fontsize=8
        )
        figure.savefig(folder / f"{name}.png", dpi=110)


def _draw(axes: Any, panel: Panel, rows: Sequence[Row]) -> None:  # noqa: ANN401  matplotlib's own
    """Medians over rounds; the shade, or the bar of a lone point, is from the lowest to the highest."""
    found = _points(panel, rows)
    for impl, measure in sorted(found, key=lambda key: (list(IMPLS).index(key[0]), panel.measures.index(key[1]))):
        points = found[impl, measure]
        sizes = sorted(points)
        label = IMPLS[impl].title + (f": {measure}" if len(panel.measures) > 1 else "")
        style, colour = STYLES[panel.measures.index(measure)], COLOURS[impl]
        low, high = ([end(points[n]) for n in sizes] for end in (min, max))
        axes.plot(sizes, [statistics.median(points[n]) for n in sizes], style, label=label, color=colour, markersize=4)
        axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
        if len(sizes) == 1:
            axes.vlines(sizes, low, high, color=colour, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=panel.label or panel.axis, ylabel="CPU time, µs", title=panel.title)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _tick(axes, sorted({size for points in found.values() for size in points}))
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _tick(axes: Any, sizes: Sequence[int]) -> None:  # noqa: ANN401  matplotlib's own
    """Names the sizes that were measured, and times in plain numbers, the more of them the fewer decades there are."""
    from matplotlib.ticker import LogLocator

    axes.minorticks_off()
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    low, high = axes.get_ylim()
    named = (1, 2, 3, 4, 5, 6, 8) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=named))
    axes.yaxis.set_major_formatter(lambda time, _: f"{time:,g}")


def _points(panel: Panel, rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(implementation, measure) → size → a median for each round."""
    usual = sizes_of(panel.script) | dict(panel.given)
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        fits = row["script"] == panel.script and row["measure"] in panel.measures
        if fits and row["options"] | {panel.axis: usual[panel.axis]} == usual:
            found[row["impl"], row["measure"]][row["options"][panel.axis]].append(row["median"])
    return found
