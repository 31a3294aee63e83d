"""What was promised for attention on a GPU, beside what the recorded rows say."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from benchmarks.gpu_report import Recorded, Rows

__all__ = ["Kept", "Measured", "gpu_promises", "in_table"]

TIMES = "\N{MULTIPLICATION SIGN}"
#: times as fast as plain decode, by shape
AGAINST_PLAIN = {
    "(256, 8192, 512)": 4.5,
    "(256, 32768, 256)": 10.5,
    "(128, 16384, 256)": 7.0,
    "(512, 4096, 256)": 4.3,
    "(64, 32768, 1024)": 4.9,
    "(64, 8192, 512)": 2.9,
    "(2, 8192, 8, 8192, 512) for 128": 3.2,
    "(1, 16384, 32, 2048, 128) for 256": 7.3,
    "(4, 2048, 4, 4096, 256) for 128": 2.3,
    "(8, 4096, 4, 256, 1024) for 256": 1.9,
}
#: times the bound, by shape
OVER_BOUND = {
    "(256, 8192, 512)": 1.2,
    "(256, 32768, 256)": 1.2,
    "(2, 8192, 8, 8192, 512) for 128": 1.2,
    "(1, 16384, 32, 2048, 128) for 256": 1.3,
    "(128, 16384, 256)": 1.4,
    "(64, 32768, 1024)": 1.4,
}


class Kept(NamedTuple):
    """A promise: what of, what was promised, what was measured, and whether it is kept."""

    what: str
    promised: str
    measured: str
    is_kept: bool


def in_table(promises: list[Kept]) -> str:
    """The promises as a table, those that are not kept marked."""
    lines = ["| what | promised | measured | met |", "|---|---|---:|---|"]
    lines += [
        f"| {what} | {promised} | {found} | {'yes' if met else '**no**'} |" for what, promised, found, met in promises
    ]
    return "\n".join(lines)


class Measured(NamedTuple):
    """What was measured in bfloat16, by how much the planner's constants had seen of it.

    Attributes:
        known: the fixed shapes and those of seed 0, with 32 query heads on 8 KV heads.
        fresh: shapes that the constants had not seen.
        other: other shapes with the same heads.
        heads: the fixed shapes with other heads, by their numbers in words.
    """

    known: Recorded
    fresh: list[Recorded]
    other: list[Recorded]
    heads: dict[str, Recorded]


def gpu_promises(measured: Measured, float16: Recorded, steps: Rows) -> list[Kept]:
    """All of them.

    Args:
        measured: in bfloat16.
        float16: in float16, the fixed shapes and those of seed 0.
        steps: what `gpu_step` left.
    """
    known, fresh, other, heads = measured
    every = [row for found in (known, *fresh, *other) for row in found.rows]
    rows = every + [row for found in heads.values() for row in found.rows]
    return [
        *_of_shapes({row["name"]: row for row in known.rows}),
        _cascade(f"{len(every)} shapes", every),
        *(_cascade(f"the fixed shapes with {what}", found.rows) for what, found in heads.items()),
        *_of_planner(f"{len(known.rows)} shapes", [known]),
        *_of_planner(f"{sum(len(found.rows) for found in fresh)} shapes that it had not seen", fresh),
        *_of_host(known.rows),
        *_of_steps({row["packing"]: row for row in steps if "packing" in row}),
        *_of_forks(next(row for row in steps if "forks" in row)),
        _error(f"errors in bfloat16, {len(rows)} shapes", 1e-2, rows),
        _error(f"errors in float16, {len(float16.rows)} shapes", 2e-3, float16.rows),
    ]


def _cascade(shapes: str, rows: Rows) -> Kept:
    found = min(row["cascade_us"] / row["ours_us"] for row in rows)
    return _at_least(f"against the cascade wrapper, {shapes}", 1.9, found)


def _of_shapes(by_name: dict[str, dict[str, Any]]) -> Iterator[Kept]:
    for name, least in AGAINST_PLAIN.items():
        yield _at_least(f"against plain decode, {name}", least, by_name[name]["plain_us"] / by_name[name]["ours_us"])
    for name, most in OVER_BOUND.items():
        yield _at_most(f"over the bound, {name}", most, by_name[name]["ours_us"] / by_name[name]["bound_us"])
    row = by_name["(256, 8192, 512)"]
    yield _at_least(f"against the cascade wrapper, {row['name']}", 3.5, row["cascade_us"] / row["ours_us"])


def _of_planner(shapes: str, measured: list[Recorded]) -> Iterator[Kept]:
    losses = [loss for found in measured for loss in found.losses]
    yield _share(f"planner behind the best choice, worst of {shapes}", 0.05, max(losses))
    yield _share(f"the same, median of {shapes}", 0.01, statistics.median(losses))
    slower = max(row["ours_us"] / row["plain_us"] - 1 for found in measured for row in found.rows)
    yield _share(f"ours behind plain decode, worst of {shapes}", 0.02, slower)


def _of_host(rows: Rows) -> Iterator[Kept]:
    hosts = {
        "one prefix": [_host_us(row) for row in rows if row["shape"][0] == 256 and row["shape"][3] == 1],
        "a forest": [_host_us(row) for row in rows if row["shape"][0] == 256 and row["shape"][3] > 1],
    }
    for what, us in hosts.items():
        yield Kept(f"planner, CPU time, a new batch of 256 with {what}", "≤ 300 µs", _range(us), max(us) <= 300)


def _of_steps(by_packing: dict[str, dict[str, Any]]) -> Iterator[Kept]:
    plain, hybrid = by_packing["plain"], by_packing["hybrid"]
    for what, name in (("eager", "eager_us"), ("one CUDA graph", "replay_us")):
        yield _at_least(f"decode step of 32 layers, hybrid against plain, {what}", 3.0, plain[name] / hybrid[name])
    yield _share(
        "`run`, CPU time over flashinfer's by hand", 0.03, hybrid["layers_us"] / hybrid["layers_by_hand_us"] - 1
    )
    for what, name in (("the next step", "plan_us"), ("a batch of which nothing is known", "plan_all_new_us")):
        for row in (plain, hybrid):
            ratio = row[name] / row["plan_by_hand_us"]
            yield _at_most(f"`plan` over flashinfer's by hand, {what}, {row['packing']}", 1.3, ratio)


def _of_forks(row: dict[str, Any]) -> Iterator[Kept]:
    yield _at_most(f"tails of {row['forks']} forks, over the time of their bytes", 3.0, row["us"] / row["bytes_us"])


def _host_us(row: dict[str, Any]) -> float:
    return float(row["forest_us"] + row["planner_us"])


def _range(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f} µs"


def _at_least(what: str, least: float, found: float) -> Kept:
    return Kept(what, f"≥ {least:g}{TIMES}", f"{found:.2f}{TIMES}", found >= least)


def _at_most(what: str, most: float, found: float) -> Kept:
    return Kept(what, f"≤ {most:g}{TIMES}", f"{found:.2f}{TIMES}", found <= most)


def _share(what: str, most: float, found: float) -> Kept:
    return Kept(what, f"≤ {most:.0%}", f"{max(found, 0.0):.1%}", found <= most)


def _error(what: str, most: float, rows: Rows) -> Kept:
    worst = max(row["error"] for row in rows)
    return Kept(what, f"≤ {most:g}", f"{worst:.1e}", worst <= most)
