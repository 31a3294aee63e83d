"""Figures that an independent program and other engines' caches found: a quick part of `tests/replay/acceptance.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from radix.replay.distinct import count_all_pages, count_full_pages
from radix.replay.readers import read_trace
from radix.replay.simulator import simulate
from tests.replay.acceptance import ALL_BLOCKS, FULL_BLOCKS, MOONCAKE, SESSIONS, chat_figure, trace_figure
from tests.traces import expected

TEXT = "lmcache-agent-trace/miniswe_public.jsonl.xz"


def test_the_conversation_trace_has_the_known_size(traces: Path) -> None:
    requests = list(read_trace(traces / MOONCAKE))
    assert (len(requests), sum(request.num_tokens for request in requests)) == (12_031, 144_793_823)
    assert count_full_pages(requests, 512) == expected(FULL_BLOCKS, "infinite", 1.0)["capacity_blocks"]
    assert count_all_pages(requests, 512) == expected(ALL_BLOCKS, "infinite", 1.0)["capacity_blocks"]


def test_the_sessions_have_the_known_size(traces: Path) -> None:
    requests = list(read_trace(traces / SESSIONS))
    assert (len(requests), sum(request.num_tokens for request in requests)) == (2_954, 416_536_800)
    assert count_full_pages(requests, 64) == 249_581
    assert requests[0].token_ids().dtype.itemsize == 4


@pytest.mark.parametrize("entry", [FULL_BLOCKS, ALL_BLOCKS])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, None])
def test_the_conversation_trace_hits_as_known(traces: Path, entry: str, fraction: float | None) -> None:
    figure = trace_figure(list(read_trace(traces / MOONCAKE)), entry, 512, fraction)
    assert figure.is_equal, figure


def test_the_first_sessions_hit_what_an_endless_cache_would(traces: Path) -> None:
    """Hits of a cache that evicts nothing are the accesses to pages that were there before."""
    requests = list(read_trace(traces / SESSIONS))[:300]
    report = simulate(requests, page_size=64, whole_pages=True)
    assert report.hit_pages == report.page_accesses - count_full_pages(requests, 64)


def test_real_text_hits_more_with_tails_than_with_whole_pages(traces: Path) -> None:
    requests = list(read_trace(traces / TEXT))
    token, tails, whole = (
        simulate(requests, page_size=page_size, whole_pages=whole_pages)
        for page_size, whole_pages in ((1, True), (64, False), (64, True))
    )
    assert token.hit_tokens == tails.hit_tokens > whole.hit_tokens
    assert tails.token_hit_rate > 0.9


@pytest.mark.parametrize(
    ("num_live", "page_size", "whole_pages", "rate"), [(64, 64, True, 0.9413), (500, 64, False, 0.765)]
)
def test_the_uniform_chat_hits_as_known(num_live: int, page_size: int, whole_pages: bool, rate: float) -> None:
    figure = chat_figure(num_live, page_size, whole_pages, rate, 0.00005 if num_live == 64 else 0.002)
    assert figure.is_equal, figure
