"""Every known figure, replayed and compared: `python -m tests.replay.acceptance`, some minutes of one core.

An independent program counted the hits of the traces; the chat workload's rates are those of other engines' caches, and
with tails on those of a cache whose pages hold one token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from radix.cache import PrefixCache
from radix.replay.readers import read_trace
from radix.replay.request import Request
from radix.replay.simulator import capacity_of, replay_chat, simulate
from radix.replay.workload import UniformChat
from seqattn.pages import PageAllocator
from tests.traces import TRACES, expected, why_absent

FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5)
MOONCAKE = "mooncake/conversation_trace.jsonl.gz"
SESSIONS = "kv-cache-tester/sessions.jsonl.gz"
FULL_BLOCKS = "mooncake/conversation (full 512-token blocks only)"
ALL_BLOCKS = "mooncake/conversation (all blocks, last may be partial)"
ALL_SESSIONS = "kv-cache-tester/sessions (load_weka defaults)"
TRACE_ENTRIES = [(MOONCAKE, FULL_BLOCKS, 512), (MOONCAKE, ALL_BLOCKS, 512), (SESSIONS, ALL_SESSIONS, 64)]

#: hit rates of the uniform chat: live conversations, page size, whole pages, rate, how far off is still equal
CHAT_RATES = [
    (64, 1, True, 0.9534, 0.00005),
    (64, 16, True, 0.9506, 0.00005),
    (64, 64, True, 0.9413, 0.00005),
    (64, 16, False, 0.9534, 0.001),
    (64, 64, False, 0.9534, 0.001),
    (500, 16, True, 0.7710, 0.002),
    (500, 64, True, 0.7573, 0.002),
    (500, 64, False, 0.765, 0.002),
]


class Figure(NamedTuple):
    """One figure: what was replayed, what came out, what is known, CPU seconds."""

    what: str
    got: str
    known: str
    is_equal: bool
    cpu_seconds: float


def trace_figure(requests: list[Request], entry: str, page_size: int, fraction: float | None) -> Figure:
    """Hits of a trace at one capacity or, for None, without one; tails are on where `entry` has partial blocks.

    A known hit of a partial block is a page that is copied here, not shared.
    """
    whole_pages = entry != ALL_BLOCKS
    known = expected(entry, "leaf_lru", fraction) if fraction else expected(entry, "infinite", 1.0)
    capacity = None
    if fraction:
        capacity = capacity_of(requests, page_size=page_size, fraction=fraction, whole_pages=whole_pages)
    report = simulate(requests, page_size=page_size, capacity_pages=capacity, whole_pages=whole_pages)
    got = (report.hit_tokens, report.hit_pages + report.forked_pages, capacity or known["capacity_blocks"])
    wanted = (known["hit_tokens"], known["hit_blocks"], known["capacity_blocks"])
    at = f"{fraction:.0%} of the pages" if fraction else "no limit"
    what = f"{entry.partition('/')[0]}, {'whole pages' if whole_pages else 'tails'}, page {page_size}, {at}"
    return Figure(what, "{:,} tokens".format(*got), "{:,} tokens".format(*wanted), got == wanted, report.cpu_seconds)


def chat_figure(num_live: int, page_size: int, whole_pages: bool, known: float, within: float) -> Figure:
    """The hit rate of the uniform chat."""
    chat = UniformChat(num_live=num_live)
    cache = PrefixCache(PageAllocator(chat.capacity_pages(page_size), page_size), whole_pages=whole_pages)
    report = replay_chat(chat.turns(), cache)
    rate = report.token_hit_rate
    what = f"chat, {num_live} live, page {page_size}, {'whole pages' if whole_pages else 'tails'}"
    is_equal = abs(rate - known) <= within
    return Figure(what, f"{rate:.4f}", f"{known:.4f} ± {within:g}", is_equal, report.cpu_seconds)


def figures() -> Iterator[Figure]:
    """All of them, one by one."""
    for row in CHAT_RATES:
        yield chat_figure(*row)
    for trace, entry, page_size in TRACE_ENTRIES:
        requests = list(read_trace(TRACES / trace))
        for fraction in (*FRACTIONS, None):
            yield trace_figure(requests, entry, page_size, fraction)


def main() -> int:
    """Prints the table; the exit status is 1 if a figure differs."""
    reason = why_absent(MOONCAKE) or why_absent(SESSIONS)
    if reason:
        print(reason)
        return 1
    table = Table("replay", "got", "known", "", "CPU s")
    found = []
    for figure in figures():
        found.append(figure)
        print(figure.what, figure.got, file=sys.stderr)
        verdict = "[green]equal" if figure.is_equal else "[red]DIFFERENT"
        table.add_row(figure.what, figure.got, figure.known, verdict, f"{figure.cpu_seconds:.1f}")
    Console(width=120).print(table)
    return 0 if all(figure.is_equal for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main())
