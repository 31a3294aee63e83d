"""Where the recorded traces are; run as `python -m tests.traces`, it replays one and compares with known counts.

No other file knows the folder: tests get it from the fixture `traces`, CI runs this module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: the folder of traces; a relative one is relative to the project's root
TRACES = ROOT / os.environ.get("SEQATTN_TRACES", "../shared/traces")

TRACE = "mooncake/conversation_trace.jsonl.gz"
ENTRY = "mooncake/conversation (full 512-token blocks only)"
FRACTION = 0.1


def why_absent(name: str = "") -> str | None:
    """None where `name` is in the folder of traces, else the reason to skip."""
    path = TRACES / name
    return None if path.exists() else f"no {name or 'traces'} at {path}: set SEQATTN_TRACES to the folder of traces"


def expected(entry: str, policy: str, fraction: float) -> dict[str, Any]:
    """The counts of `expected.json` for one policy at one capacity; an independent program computed them."""
    results = json.loads((TRACES / "expected.json").read_text(encoding="utf-8"))[entry]["results"]
    found: list[dict[str, Any]] = [r for r in results if (r["policy"], r["fraction"]) == (policy, fraction)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} results for {policy} at {fraction} in {entry!r}, not one")
    return found[0]


def replay(*options: str) -> dict[str, Any]:
    """What `python -m radix replay … --json` prints, as a dict; its progress goes to stderr as usual.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "radix", "replay", *options, "--json"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> int:
    """Replays the conversation trace; the exit status is 1 where the hit count is not the known one."""
    reason = why_absent(TRACE) or why_absent("expected.json")
    if reason:
        print(f"replay of a real trace skipped: {reason}")
        return 0
    options = ["--page-size", "512", "--whole-pages", "--capacity-fraction", str(FRACTION)]
    report = replay(str(TRACES / TRACE), *options)
    want = expected(ENTRY, "leaf_lru", FRACTION)["hit_tokens"]
    verdict = "equal to" if report["hit_tokens"] == want else "DIFFERENT FROM"
    print(f"replay of {TRACE} {' '.join(options)}: {report['cpu_seconds']:.1f} s of CPU")
    print(f"{report['hit_tokens']:,} hit tokens, {verdict} the known {want:,}")
    return 0 if report["hit_tokens"] == want else 1


if __name__ == "__main__":
    sys.exit(main())
