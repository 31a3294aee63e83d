"""All benchmarks beside all peers: `make bench`.

    python -m benchmarks                             everything, with the peers, five rounds
    python -m benchmarks --peers                     without peers: no downloads
    python -m benchmarks --only match turn           these scripts; the rows of the others stay as they are
    python -m benchmarks --rounds 0                  draws and writes again what has been measured

Writes benchmarks/results/*.jsonl, docs/performance.md and docs/performance/*.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict

from benchmarks.cases import GROUPS, Group
from benchmarks.command import SCRIPTS
from benchmarks.impls import IMPLS
from benchmarks.peers import PACKAGES, make
from benchmarks.report import write_report
from benchmarks.rounds import run_groups
from benchmarks.rows import Row
from benchmarks.table import RESULTS


def chosen(scripts: list[str], peers: list[str]) -> list[Group]:
    """The groups of these scripts, with the implementations that are there."""
    there = {impl for impl, where in IMPLS.items() if where.peer is None or where.peer in peers}
    return [
        group._replace(impls=tuple(impl for impl in group.impls if impl in there))
        for group in GROUPS
        if group.script in scripts
    ]


def run(scripts: list[str], peers: list[str], num_rounds: int) -> None:
    """Measures, and keeps the rows."""
    for peer in peers:
        make(peer)
    begin = time.monotonic()
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in run_groups(chosen(scripts, peers), num_rounds):
        rows[row["script"]].append(row)
    RESULTS.mkdir(exist_ok=True)
    for script, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (RESULTS / f"{script}.jsonl").write_text(text, encoding="utf-8")
    print(f"measured in {time.monotonic() - begin:.0f} s")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", default=list(PACKAGES), help=f"of {', '.join(PACKAGES)}; default: all")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="scripts; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    args = parser.parse_args()
    if unknown := set(args.peers) - set(PACKAGES):
        parser.error(f"no peer {sorted(unknown)}: there are {', '.join(PACKAGES)}")
    if args.rounds:
        run(args.only, args.peers, args.rounds)
    print(write_report())


if __name__ == "__main__":
    main()
