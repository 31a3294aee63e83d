"""Replays traces and workloads through a `PrefixCache` to see what it would save; `python -m radix replay` runs it.

    requests = list(read_trace("conversation_trace.jsonl.gz"))
    capacity = capacity_of(requests, page_size=16, fraction=0.1, whole_pages=False)
    report = simulate(requests, page_size=16, capacity_pages=capacity)
    print(report.token_hit_rate)

The other formats of traces are read the same way; `ChatWorkload` makes conversations up instead.
"""

from radix.replay.distinct import count_all_pages, count_full_pages
from radix.replay.readers import FORMATS, detect_format, read_mooncake, read_sessions, read_text, read_trace
from radix.replay.report import ReplayReport
from radix.replay.request import BlockRequest, Request, TokenRequest
from radix.replay.simulator import capacity_of, replay, replay_chat, simulate
from radix.replay.tokenizer import load_tokenizer
from radix.replay.workload import ChatTurn, ChatWorkload, UniformChat

__all__ = [
    "FORMATS",
    "BlockRequest",
    "ChatTurn",
    "ChatWorkload",
    "ReplayReport",
    "Request",
    "TokenRequest",
    "UniformChat",
    "capacity_of",
    "count_all_pages",
    "count_full_pages",
    "detect_format",
    "load_tokenizer",
    "read_mooncake",
    "read_sessions",
    "read_text",
    "read_trace",
    "replay",
    "replay_chat",
    "simulate",
]
