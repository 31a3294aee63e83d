"""Runs scripts for one implementation, each run in a process of its own that has everything imported already.

    python -m benchmarks.server sglang-rust < requests > rows

reads `{"script": "match", "options": {"tokens": 1024}}` a line, and answers with the run's rows and an empty object.
The process that reads imports the peer, which takes seconds, and forks for each request; so no run sees what an earlier
one left.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from importlib import import_module

from benchmarks.command import SCRIPTS, prepared, print_run
from benchmarks.impls import load

__all__ = ["serve"]


def serve(impl: str) -> None:
    """Answers requests until stdin ends."""
    load(impl)
    for script in SCRIPTS:
        import_module(f"benchmarks.{script}")
    gc.collect()
    gc.freeze()  # what is imported stays where it is: a collection in a child does not copy its pages
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _answer(impl, line)
        os.waitpid(child, 0)
    os._exit(0)  # without the complaints of libraries that never expected to end


def _answer(impl: str, line: str) -> None:
    """One run, and the end of this process."""
    status = 1
    try:
        request = json.loads(line)
        print_run(prepared(request["script"], impl, request["options"])())
        status = 0
    finally:
        sys.stdout.flush()
        if status:
            import traceback

            traceback.print_exc()
            print('{"failed": true}', flush=True)
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
