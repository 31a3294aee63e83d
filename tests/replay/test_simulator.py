"""The simulator, against figures counted by hand and a slow leaf-first LRU of its own."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix.cache import PrefixCache
from radix.replay import simulator
from radix.replay.report import ReplayReport
from radix.replay.request import BlockRequest, TokenRequest
from radix.replay.simulator import capacity_of, replay, replay_chat, simulate
from radix.replay.workload import ChatTurn, ChatWorkload
from seqattn.errors import BadValueError, NoPageError
from seqattn.pages import PageAllocator


def text(*prompts: str) -> list[TokenRequest]:
    return [TokenRequest(np.frombuffer(prompt.encode(), np.uint8)) for prompt in prompts]


class SlowLeafLru:
    """A prefix cache as a dict from prefix to the time of its last use: obvious, and slow."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used: dict[tuple[int, ...], int] = {}
        self.num_hits = self.num_evicted = 0

    def request(self, now: int, blocks: list[int]) -> None:
        path = [tuple(blocks[: end + 1]) for end in range(min(len(blocks), self.capacity))]
        self.num_hits += sum(prefix in self.used for prefix in path)
        self.used |= dict.fromkeys(path, now)
        while len(self.used) > self.capacity:
            leaves = [prefix for prefix in self.used if not self._has_child(prefix)]
            # oldest first, the request's own last, deepest first among equals
            del self.used[min(leaves, key=lambda prefix: (self.used[prefix], -len(prefix)))]
            self.num_evicted += 1

    def _has_child(self, prefix: tuple[int, ...]) -> bool:
        return any(other[:-1] == prefix for other in self.used)


# -- whole pages -------------------------------------------------------------------------------------------------------


@st.composite
def block_requests(draw: st.DrawFn) -> list[list[int]]:
    """Hash ids as in a trace: a block has always the same predecessor, so its number names its whole prefix."""
    paths = draw(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=25))
    numbers: dict[tuple[int, ...], int] = {}
    return [[numbers.setdefault(tuple(path[: end + 1]), len(numbers)) for end in range(len(path))] for path in paths]


@given(block_requests(), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2))
def test_whole_pages_hit_and_evict_what_a_slow_leaf_first_lru_does(
    trace: list[list[int]], capacity: int, block_size: int, tail: int
) -> None:
    slow = SlowLeafLru(capacity)
    for now, blocks in enumerate(trace):
        slow.request(now, blocks)
    tail = min(tail, block_size - 1)
    requests = [
        BlockRequest(
            blocks=np.array(blocks, np.int32),
            block_size=block_size,
            num_tokens=len(blocks) * block_size + tail,
            tail_start=1000 + now * tail,
        )
        for now, blocks in enumerate(trace)
    ]
    report = simulate(requests, page_size=block_size, capacity_pages=capacity, whole_pages=True)
    assert (report.hit_pages, report.evicted_pages) == (slow.num_hits, slow.num_evicted)
    assert report.hit_tokens == slow.num_hits * block_size
    assert report.requests == len(trace)
    assert report.input_tokens == sum(len(blocks) * block_size + tail for blocks in trace)
    assert report.page_accesses == sum(map(len, trace))


def test_a_prompt_without_a_full_page_counts_and_starts_nothing() -> None:
    report = simulate(text("abc", "abc", ""), page_size=4, whole_pages=True)
    assert (report.requests, report.input_tokens, report.page_accesses, report.hit_tokens) == (3, 6, 0, 0)


def test_a_prompt_larger_than_the_cache_keeps_its_first_pages() -> None:
    report = simulate(text("abcdefgh", "abcdXY"), page_size=2, capacity_pages=2, whole_pages=True)
    assert (report.hit_tokens, report.input_tokens, report.page_accesses, report.evicted_pages) == (4, 14, 7, 0)


# -- tails -------------------------------------------------------------------------------------------------------------


def test_tails_hit_to_the_token_where_whole_pages_miss() -> None:
    requests = text("abcdef", "abcdexyz", "abcdef")
    tails, whole = (simulate(requests, page_size=4, whole_pages=flag) for flag in (False, True))
    assert (tails.hit_tokens, tails.forked_pages, tails.hit_pages, tails.page_accesses) == (5 + 6, 2, 2, 6)
    assert (whole.hit_tokens, whole.forked_pages, whole.hit_pages, whole.page_accesses) == (4 + 4, 0, 2, 4)


def test_with_tails_a_prompt_larger_than_the_cache_is_cut_to_it() -> None:
    """The third prompt matches three tokens, but no page is left to copy the third one into."""
    report = simulate(text("abcdefgh", "abcdef", "abcx"), page_size=2, capacity_pages=2)
    assert (report.hit_tokens, report.forked_pages, report.evicted_pages) == (4 + 2, 0, 1)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=12), st.integers(1, 5))
def test_without_a_limit_hits_are_the_longest_common_prefixes(prompts: list[list[int]], page_size: int) -> None:
    requests = [TokenRequest(np.array(prompt, np.int32)) for prompt in prompts]
    report = simulate(requests, page_size=page_size)
    longest = [max((a.common_prefix_len(b) for b in requests[:i]), default=0) for i, a in enumerate(requests)]
    assert report.hit_tokens == sum(longest)
    assert (report.evicted_pages, report.capacity_pages) == (0, None)


# -- the report --------------------------------------------------------------------------------------------------------


def test_a_report_names_every_figure_in_order() -> None:
    report = simulate(text("abcd", "abcd"), page_size=2, capacity_pages=2, whole_pages=True)
    fields = report.as_dict()
    assert fields.pop("cpu_seconds") > 0
    assert list(fields.items()) == [
        ("requests", 2),
        ("input_tokens", 8),
        ("hit_tokens", 4),
        ("hit_pages", 2),
        ("page_accesses", 4),
        ("token_hit_rate", 0.5),
        ("page_hit_rate", 0.5),
        ("evicted_pages", 0),
        ("forked_pages", 0),
        ("capacity_pages", 2),
        ("page_size", 2),
        ("policy", "lru"),
        ("whole_pages", True),
    ]


def test_no_requests_make_a_report_of_zeros() -> None:
    report = simulate([], page_size=4)
    assert (report.requests, report.token_hit_rate, report.page_hit_rate) == (0, 0.0, 0.0)


def test_each_request_is_told_to_the_progress_bar() -> None:
    told: list[None] = []
    simulate(text("a", "", "b"), page_size=1, on_request=lambda: told.append(None))
    assert len(told) == 3


def test_the_whole_state_is_checked_as_often_as_promised_and_at_the_end() -> None:
    with patch.object(PrefixCache, "check", autospec=True) as check, patch.object(simulator, "CHECK_EVERY", 2):
        simulate(text("a", "b", "c", "", ""), page_size=1)
    assert check.call_count == 2 + 1


# -- capacity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "whole_pages", "capacity"), [(1.0, True, 4), (0.375, True, 2), (0.37, True, 1), (0.5, False, 3)]
)
def test_a_capacity_is_a_share_of_the_distinct_pages_rounded_half_up(
    fraction: float, whole_pages: bool, capacity: int
) -> None:
    """Full pages ab, cd and ce after ab, ad; with tails also f, but not c after ab: cd begins with it."""
    requests = text("abcd", "abcef", "ad", "abc")
    assert capacity_of(requests, page_size=2, fraction=fraction, whole_pages=whole_pages) == capacity


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_a_fraction_that_is_none_is_an_error(fraction: float) -> None:
    with pytest.raises(BadValueError, match=f"a capacity of {fraction} of the distinct pages"):
        capacity_of(text("a"), page_size=1, fraction=fraction, whole_pages=False)


def test_a_fraction_of_less_than_half_a_page_is_an_error() -> None:
    with pytest.raises(BadValueError, match=r"0\.1 of 3 distinct pages is no page"):
        capacity_of(text("abc"), page_size=1, fraction=0.1, whole_pages=False)


def test_a_cache_that_was_used_before_is_refused() -> None:
    cache = PrefixCache(PageAllocator(4, 2))
    replay(text("abc"), cache)
    with pytest.raises(BadValueError, match="3 tokens went through this cache before"):
        replay(text("abc"), cache)
    with pytest.raises(BadValueError, match="use a new one"):
        replay_chat([], cache)


# -- chat --------------------------------------------------------------------------------------------------------------


def chat(turns: list[ChatTurn], num_pages: int, page_size: int, *, whole_pages: bool = False) -> ReplayReport:
    return replay_chat(turns, PrefixCache(PageAllocator(num_pages, page_size), whole_pages=whole_pages))


def test_a_turn_finds_the_conversation_before_it_and_computes_its_last_token() -> None:
    first = ChatTurn(np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32))
    again = ChatTurn(first.prompt, first.reply)
    second = ChatTurn(np.array([1, 2, 3, 4, 5, 6], np.int32), np.array([7], np.int32))
    report = chat([first, again, second], 20, 4)
    assert (report.hit_tokens, report.input_tokens, report.requests) == (2 + 5, 3 + 3 + 6, 3)


def test_a_chat_with_room_for_all_of_it_hits_whatever_it_said_before() -> None:
    turns = list(ChatWorkload(num_conversations=12, num_turns=3, num_live=4).turns())
    wanted, seen = 0, list[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]()
    for turn in turns:
        request = TokenRequest(turn.prompt[:-1])
        wanted += max((request.common_prefix_len(TokenRequest(before)) for before in seen), default=0)
        seen.append(turn.as_request().token_ids())
    reports = [chat(turns, 100_000 // page_size, page_size) for page_size in (1, 16, 64)]
    assert [report.hit_tokens for report in reports] == [wanted] * 3


def test_a_turn_larger_than_the_cache_is_an_error() -> None:
    with pytest.raises(NoPageError):
        chat([ChatTurn(np.arange(5, dtype=np.int32), np.arange(5, dtype=np.int32))], 2, 4)
