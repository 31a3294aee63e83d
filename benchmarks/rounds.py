"""Runs groups: ours and the peers alternately, round after round.

    round 1     ours, SGLang, vLLM │ ours, SGLang │ …        a process that has imported it serves each implementation
    round 2     vLLM, SGLang, ours │ SGLang, ours │ …        new processes, opposite order

A ratio is taken within a round, so a machine that is slow for a minute is slow for both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from benchmarks.cases import Group
from benchmarks.impls import IMPLS
from benchmarks.peers import ROOT, interpreter
from benchmarks.rows import Row

__all__ = ["run_groups"]


class Worker:
    """A process that answers each line on its stdin with the rows of one run."""

    def __init__(self, impl: str, module: str, arguments: list[str]) -> None:
        command = [interpreter(IMPLS[impl].peer), "-m", f"benchmarks.{module}", *arguments]
        #: says so with an empty run when it is done
        self.is_building = False
        self.name = " ".join(command[1:])
        self.process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.process.terminate()  # it may be building for a minute yet
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()
        self.process.wait()

    def ask(self, request: dict[str, Any]) -> list[Row]:
        """The rows of one run.

        Raises:
            RuntimeError: the run failed; what it said stands on stderr.
        """
        assert self.process.stdin
        if self.is_building:
            self.is_building = False
            assert not self.answer(), "a worker says when it has built, and no more"
        self.process.stdin.write(json.dumps(request) + "\n")
        return self.answer()

    def answer(self) -> list[Row]:
        """The rows until the end of a run."""
        assert self.process.stdout
        rows: list[Row] = []
        for line in self.process.stdout:
            row: Row = json.loads(line)
            if "failed" in row:
                break
            if not row:
                return rows
            rows.append(row)
        raise RuntimeError(f"{self.name} failed")


def run_groups(groups: Iterable[Group], num_rounds: int) -> Iterator[Row]:
    """Every row, with its round, as it comes."""
    groups = list(groups)
    for group in groups:
        if group.fresh:
            yield from _run_fresh(group)
        elif group.keeps:
            yield from _run_kept(group, num_rounds)
    served = [group for group in groups if not (group.fresh or group.keeps)]
    for at in range(num_rounds if served else 0):
        with ExitStack() as stack:
            impls = sorted({impl for group in served for impl in group.impls})
            servers = {impl: stack.enter_context(Worker(impl, "server", [impl])) for impl in impls}
            for group in served:
                _say(f"round {at + 1} of {num_rounds}", group)
                for impl in _order(group, at):
                    request = {"script": group.script, "options": group.options}
                    yield from _numbered(servers[impl].ask(request), at)


def _run_fresh(group: Group) -> Iterator[Row]:
    """Each run in a process of its own, which nothing else has used."""
    _say("fresh processes", group)
    for impl in group.impls:
        with _waiting(group, impl) as worker:
            yield from _numbered(worker.ask({}), 0)


def _run_kept(group: Group, num_rounds: int) -> Iterator[Row]:
    """One process for each implementation, built once; then runs alternate, after one that does not count."""
    _say("built once", group)
    with ExitStack() as stack:
        workers = {impl: stack.enter_context(_waiting(group, impl)) for impl in group.impls}
        for at in range(-1, num_rounds):
            for impl in _order(group, at):
                rows = _numbered(workers[impl].ask({}), at)
                yield from rows if at >= 0 else ()


def _waiting(group: Group, impl: str) -> Worker:
    """A worker that has built what the group is about, or is about to."""
    named = [word for name, value in group.options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    worker = Worker(impl, group.script, ["--impl", impl, "--wait", *named])
    worker.is_building = True
    return worker


def _order(group: Group, at: int) -> tuple[str, ...]:
    return group.impls[::-1] if at % 2 else group.impls


def _numbered(rows: Iterable[Row], at: int) -> Iterator[Row]:
    for row in rows:
        yield row | {"round": at + 1}


def _say(when: str, group: Group) -> None:
    sizes = ", ".join(f"{name} {value}" for name, value in group.options.items())
    print(f"{when}: {group.script} {sizes}", file=sys.stderr, flush=True)
