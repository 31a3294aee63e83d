"""The command line that all scripts share.

    python -m benchmarks.match --impl sglang-rust --tokens 8192      prints rows, a JSON object a line

Each script has `OPTIONS`, its sizes with their defaults, and `prepare`, which builds what is measured and returns a
function that takes one run's samples. A peer is run by the Python of its own environment, which is made if need be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.clock import Sample
from benchmarks.impls import IMPLS, load
from benchmarks.peers import interpreter, make
from benchmarks.rows import Row, make_row

__all__ = ["SCRIPTS", "TakeSamples", "main", "prepared", "print_run", "sizes_of"]

#: in the order of the report; `anatomy`, `tokens`, `copies` and `attention` have no peer
SCRIPTS = (
    "match",
    "insert",
    "turn",
    "anatomy",
    "deep",
    "evict",
    "allocate",
    "pack",
    "memory",
    "tokens",
    "copies",
    "attention",
)

TakeSamples = Callable[[], dict[str, Sample]]


def sizes_of(script: str) -> dict[str, Any]:
    """A script's sizes and their defaults."""
    found: dict[str, Any] = import_module(f"benchmarks.{script}").OPTIONS
    return found


def prepared(script: str, impl: str, options: dict[str, Any]) -> Callable[[], list[Row]]:
    """Builds what is measured; each call of what comes back is a run."""
    module, adapter = import_module(f"benchmarks.{script}"), load(impl)
    options = sizes_of(script) | options
    take: TakeSamples = module.prepare(adapter, **options)
    return lambda: [make_row(script, impl, options, name, sample, adapter.package) for name, sample in take().items()]


def main(script: str, options: dict[str, Any], arguments: list[str] | None = None) -> None:
    """Runs a script from its command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{script}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--impl", choices=IMPLS, default="ours", help="whose code is measured")
    parser.add_argument("--wait", action="store_true", help="build, then one run for each line read from stdin")
    for name, default in options.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=" ")
    parsed = vars(parser.parse_args(arguments))
    impl, wait = parsed.pop("impl"), parsed.pop("wait")
    _run_in_environment(impl, script, sys.argv[1:] if arguments is None else arguments)
    run = prepared(script, impl, parsed)
    if wait:
        print_run([])
        for _ in sys.stdin:
            print_run(run())
    else:
        print_run(run(), end="")
    if IMPLS[impl].peer:
        os._exit(0)  # without the complaints of libraries that never expected to end


def print_run(rows: list[Row], *, end: str = "{}\n") -> None:
    """Rows of JSON; an empty object ends a run."""
    print(*map(json.dumps, rows), sep="\n", end="\n" * bool(rows) + end, flush=True)


def _run_in_environment(impl: str, script: str, arguments: list[str]) -> None:
    """Goes on in the Python of the implementation's environment; comes back if this is it."""
    peer = IMPLS[impl].peer
    python = interpreter(peer)
    if peer is None or python == sys.executable:
        return
    make(peer)
    os.execv(python, [python, "-m", f"benchmarks.{script}", *arguments])
