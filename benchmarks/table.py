"""Rows → the table of claims.

    python -m benchmarks.table                    from benchmarks/results/*.jsonl
    python -m benchmarks.table rows.jsonl …       from these files

A ratio is taken within each round, ours and the peer directly one after the other; the table has the median over rounds
and the lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases import CLAIMS, Claim, Figure
from benchmarks.command import sizes_of
from benchmarks.impls import IMPLS
from benchmarks.rows import Row, row_files

__all__ = ["RESULTS", "Outcome", "judge", "load_rows", "markdown"]

TIMES = "\N{MULTIPLICATION SIGN}"
RESULTS = Path(__file__).resolve().parent / "results"


class Outcome(NamedTuple):
    """What came of a claim; all empty if one of its sides has not been run.

    Attributes:
        claim: the claim.
        ours: our figures, one a round.
        peers: those that they are compared with.
    """

    claim: Claim
    ours: list[float]
    peers: list[float]

    @property
    def values(self) -> list[float]:
        """The claim's ratio in each round; our figures themselves where a limit is in bytes."""
        if self.claim.unit == "B":
            return self.ours
        pairs = zip(self.ours, self.peers, strict=True)
        return [mine / other if self.claim.at_most else other / mine for mine, other in pairs]

    @property
    def value(self) -> float:
        """The median over rounds."""
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        """Whether the floor is reached, or the ceiling kept; None where nothing is promised."""
        if self.claim.at_least is not None:
            return self.value >= self.claim.at_least
        return None if self.claim.at_most is None else self.value <= self.claim.at_most


def load_rows(paths: Iterable[Path]) -> list[Row]:
    """All rows of these files."""
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def figures(rows: Sequence[Row], wanted: Figure) -> dict[int, Row]:
    """The rows that have this figure, by round."""
    options = sizes_of(wanted.script) | wanted.options
    name = (wanted.script, wanted.impl, wanted.measure, options)
    return {row["round"]: row for row in rows if (row["script"], row["impl"], row["measure"], row["options"]) == name}


def judge(claim: Claim, rows: Sequence[Row]) -> Outcome:
    """Compares the rounds that both sides have."""
    ours = figures(rows, claim.ours)
    peers = figures(rows, claim.peer) if claim.peer else ours
    both = sorted(ours.keys() & peers.keys())
    other = claim.peer or claim.ours
    return Outcome(
        claim,
        [ours[at][claim.ours.statistic] for at in both],
        [peers[at][other.statistic] for at in both] if claim.peer else [],
    )


def markdown(rows: Sequence[Row], claims: Iterable[Claim] = CLAIMS) -> str:
    """The table, a line for each claim."""
    head = ["what", "against", "ours", "theirs", "ratio", "lowest to highest", "promised", "met"]
    lines = [head, ["---"] * 4 + ["---:"] * 2 + ["---"] * 2]
    lines[1][2:4] = ["---:", "---:"]
    lines += [_cells(judge(claim, rows)) for claim in claims]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(found: Outcome) -> list[str]:
    claim, met = found.claim, {True: "yes", False: "**no**", None: ""}
    promised = f"≥ {claim.at_least:,g}{TIMES}" if claim.at_least is not None else ""
    if claim.at_most is not None:
        promised = f"≤ {claim.at_most:g}" + (" B" if claim.unit == "B" else TIMES)
    other = claim.peer
    against = "" if other is None else IMPLS[other.impl].title if other.impl != claim.ours.impl else "ours"
    if not found.ours:
        return [claim.what, against, "not run", "", "", "", promised, ""]
    sides = [quantity(statistics.median(side), claim.unit) if side else "" for side in (found.ours, found.peers)]
    ratio, spread = (
        f"{significant(found.value)}{TIMES}",
        f"{significant(min(found.values))} to {significant(max(found.values))}",
    )
    if claim.unit == "B":
        ratio, spread = "", ""
    return [claim.what, against, *sides, ratio, spread, promised, met[found.is_met]]


def quantity(value: float, unit: str) -> str:
    """A time or a size with its unit, three digits of it."""
    if unit == "B":
        return f"{significant(value)} B"
    return f"{significant(value)} µs" if value < 1e4 else f"{significant(value / 1e3)} ms"


def significant(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=row_files(RESULTS))
    print(markdown(load_rows(parser.parse_args().files)))


if __name__ == "__main__":
    main()
