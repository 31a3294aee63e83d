"""How fast the host side is, measured beside the peers in one run.

    script (match, insert, turn, …)  ──▶  rows: one JSON object a line, median, p10, p90 of CPU time
      │  in the environment of the implementation that it runs: the project's own, or a peer's under .bench/
      └─ alone:     python -m benchmarks.match --impl ours --tokens 1024
         together:  make bench ──▶ results/*.jsonl ──▶ table, docs/performance.md, plots

`cases` lists what is run and what is promised, `rounds` runs ours and the peers alternately, `table` turns rows into
ratios. Only `impls` knows an implementation; the scripts know none.
"""

import os

# One thread, as in a scheduler: numpy and torch read this when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
