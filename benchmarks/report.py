"""Writes docs/performance.md: the text of performance.template.md around the tables made from rows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.cases import CLAIMS, GROUPS, Group
from benchmarks.chat_report import chat_parts
from benchmarks.command import sizes_of
from benchmarks.gpu_report import draw_gpu, gpu_kept, gpu_parts
from benchmarks.impls import IMPLS
from benchmarks.peers import ROOT
from benchmarks.plots import draw_all
from benchmarks.rows import Row, row_files
from benchmarks.table import RESULTS, judge, load_rows, markdown, quantity, significant

__all__ = ["write_report"]

PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "performance"
TEMPLATE = Path(__file__).resolve().parent / "performance.template.md"

#: (script, measure, sizes in words) → implementation → its median over rounds, and the unit
Medians = dict[tuple[str, str, str], tuple[str, dict[str, float]]]


def write_report() -> str:
    """Draws the pictures, writes the page, and returns the table of claims."""
    rows = load_rows(row_files(RESULTS))
    claims = markdown(rows)
    PICTURES.mkdir(exist_ok=True)
    draw_all(rows, PICTURES)
    draw_gpu(PICTURES)
    medians = medians_of(rows)
    text = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "claims": claims,
        "score": _score(rows),
        "machine": _machine(rows),
        "hit_rates": _hit_rates(rows),
        "copies": _copies(rows),
        "anatomy": _anatomy(rows),
        "losses": _losses(medians),
        "tokens": _pivot(medians, "tokens"),
        "attention": _pivot(medians, "attention"),
        "everything": _everything(medians),
        **gpu_parts(),
        **chat_parts(),
    }
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    PAGE.write_text(text, encoding="utf-8")
    return claims


def medians_of(rows: Sequence[Row], groups: Iterable[Group] = GROUPS) -> Medians:
    """Every measure of every group; ours with tails and with whole pages are two implementations."""
    found: Medians = {}
    for group in groups:
        options = sizes_of(group.script) | group.options
        values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["script"] == group.script and row["options"] == options:
                values[row["measure"], row["unit"]][row["impl"]].append(row["median"])
        sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in group.options.items())
        for (measure, unit), by_impl in values.items():
            by_round = {impl: statistics.median(each) for impl, each in by_impl.items()}
            found[group.script, measure, sizes] = unit, by_round
    return found


def _everything(medians: Medians) -> str:
    """One line for each measure, one column for each implementation."""
    lines = [
        ["script", "measure", "sizes", *(impl.title for impl in IMPLS.values())],
        ["---"] * 3 + ["---:"] * len(IMPLS),
    ]
    for (script, measure, sizes), (unit, values) in medians.items():
        cells = [quantity(values[impl], unit) if impl in values else "" for impl in IMPLS]
        lines.append([f"`{script}`", measure, sizes, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pivot(medians: Medians, script: str) -> str:
    """Ours alone: one line for each measure, one column for each size."""
    found = {
        (measure, sizes): quantity(ours["ours"], unit)
        for (name, measure, sizes), (unit, ours) in medians.items()
        if name == script
    }
    measures, columns = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    lines = [["", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[measure, *(found.get((measure, sizes), "") for sizes in columns)] for measure in measures]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _losses(medians: Medians) -> str:
    """Where a peer's median is below ours, worst first."""
    lost = []
    for (script, measure, sizes), (unit, values) in medians.items():
        if measure in {"bytes a leaf", "bytes a token"}:
            continue  # the same loss as that of the page
        ours = {impl: value for impl, value in values.items() if IMPLS[impl].peer is None}
        for impl in values.keys() - ours.keys():
            mine = min(ours.values(), default=0.0)
            if values[impl] < mine:
                text = f"`{script}`, {measure}, {sizes}: {IMPLS[impl].title} {quantity(values[impl], unit)}"
                factor = mine / values[impl]
                lost.append((factor, f"- {text}, ours {quantity(mine, unit)} ({significant(factor)} times as much)"))
    return "\n".join(line for _, line in sorted(lost, reverse=True)) or "- Nowhere in this run."


def _score(rows: Sequence[Row]) -> str:
    """How many promises are kept."""
    judged = [judge(claim, rows) for claim in CLAIMS if claim.at_least is not None or claim.at_most is not None]
    run = [found for found in judged if found.ours]
    skipped = f"; {len(judged) - len(run)} more were not run" if len(run) < len(judged) else ""
    kept = f"{sum(found.is_met is True for found in run)} of {len(run)} promises for the host are kept{skipped}"
    return f"{kept}, and [{gpu_kept()} for the GPU](#promises-for-the-gpu)."


def _hit_rates(rows: Sequence[Row]) -> str:
    """Of the chat, by page size and rate: who had it."""
    found: dict[tuple[int, str], set[str]] = defaultdict(set)
    for row in rows:
        if row["script"] == "turn":
            found[row["options"]["page_size"], f"{row['facts']['hit_rate']:.4f}"].add(IMPLS[row["impl"]].title)
    each = (f"page {size}: {rate} ({'; '.join(sorted(titles))})" for (size, rate), titles in sorted(found.items()))
    return ", ".join(each) + "."


def _copies(rows: Sequence[Row]) -> str:
    """What forked tails cost beside bookkeeping."""
    copies = [row for row in rows if row["script"] == "copies"]
    turns = [row for row in rows if row["script"] == "turn" and row["facts"].get("copied_tails")]
    if not copies or not turns:
        return "a copy of KV values is added for each forked tail (not run)."
    sizes, turn = copies[0]["options"], min(turns, key=lambda row: row["options"]["page_size"])
    share = turn["facts"]["copied_tails"] / turn["n"]
    median = quantity(statistics.median(row["median"] for row in copies), "us")
    return (
        f"{share:.2f} copies of KV values a turn are added (at page size {turn['options']['page_size']}). One copy of "
        f"{sizes['slots']} slots in {sizes['layers']} layers of {sizes['heads']} heads of {sizes['head_dim']} in "
        f"bfloat16, {copies[0]['facts']['bytes'] / 2**20:g} MiB, takes {median} on this CPU; on a GPU it is one kernel "
        "that the host does not wait for, and it saves computing those tokens."
    )


def _anatomy(rows: Sequence[Row]) -> str:
    """Our turn call by call: median times, of texts as long as the chat's and a tenth as long, and counts of calls."""
    times: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    facts: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["script"] == "anatomy":
            times[row["impl"], row["measure"], row["options"]["scale"]].append(row["median"])
            if row["options"]["scale"] == 1:
                facts[row["impl"], row["measure"]] = row["facts"]
    lines = [["", "call", "time", "a tenth as long", "calls of Python functions", "of C functions"]]
    lines.append(["---", "---", "---:", "---:", "---:", "---:"])
    for (impl, call), counts in facts.items():
        both = [quantity(statistics.median(times[impl, call, scale]), "us") for scale in (1.0, 0.1)]
        lines.append([IMPLS[impl].title, f"`{call}`", *both, f"{counts['python_calls']:g}", f"{counts['c_calls']:g}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if facts else "Not run."


def _machine(rows: Sequence[Row]) -> str:
    """Machine, versions and load, as the rows have them."""
    if not rows:
        return "Nothing has been measured."
    machine, loads = rows[0]["machine"], [row["load"] for row in rows]
    versions = {" ".join(pair) for row in rows for pair in row["versions"].items() if pair[0] != "implementation"}
    packages = sorted({row["versions"]["implementation"] for row in rows})
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}. "
        f"{', '.join(packages)}; {', '.join(sorted(versions))}. The load average was {min(loads):g} to {max(loads):g}, "
        f"median {statistics.median(loads):g}: the cores are shared with others."
    )
