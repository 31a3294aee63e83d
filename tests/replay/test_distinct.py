"""Counting the pages that a trace fills, against sets of all prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix.cache import PrefixCache
from radix.replay.distinct import count_all_pages, count_full_pages
from radix.replay.request import BlockRequest, Request, TokenRequest
from seqattn.pages import PageAllocator

page_sizes = st.integers(1, 5)
token_prompts = st.lists(
    st.lists(st.integers(0, 1) | st.sampled_from([255, 256, 2**31 - 1]), max_size=12).map(
        lambda ids: TokenRequest(np.array(ids, np.int32))
    ),
    max_size=8,
)
byte_prompts = st.lists(
    st.binary(max_size=12).map(lambda text: TokenRequest(np.frombuffer(text, np.uint8))), max_size=8
)


@st.composite
def block_prompts(draw: st.DrawFn) -> list[BlockRequest]:
    """Prompts as a trace has them: the last block cut in some, a tail of its own after the last block in others."""
    block_size, tail_start, prompts = draw(st.integers(1, 4)), 100, []
    for _ in range(draw(st.integers(0, 8))):
        blocks = np.array(draw(st.lists(st.integers(0, 2), max_size=4)), np.int32)
        past_last = draw(st.integers(1 - block_size if len(blocks) else 0, 3))
        num_tokens = len(blocks) * block_size + past_last
        start = tail_start if past_last > 0 else 0
        prompts.append(BlockRequest(blocks=blocks, block_size=block_size, num_tokens=num_tokens, tail_start=start))
        tail_start += max(past_last, 0)
    if prompts:
        prompts += draw(st.lists(st.sampled_from(prompts), max_size=2))
    return prompts


any_prompts: st.SearchStrategy[list[Request]] = st.one_of(token_prompts, byte_prompts, block_prompts())


def full_pages(requests: list[Request], page_size: int) -> int:
    ids = [tuple(request.token_ids().tolist()) for request in requests]
    return len({prompt[:end] for prompt in ids for end in range(page_size, len(prompt) + 1, page_size)})


def partial_pages(requests: list[Request], page_size: int) -> int:
    ids = {tuple(request.token_ids().tolist()) for request in requests}
    ends = (prompt for prompt in ids if len(prompt) % page_size)
    return sum(not any(other != end and other[: len(end)] == end for other in ids) for end in ends)


@given(any_prompts, page_sizes)
def test_full_pages_are_counted_as_prefixes_that_differ(requests: list[Request], page_size: int) -> None:
    assert count_full_pages(requests, page_size) == full_pages(requests, page_size)


@given(any_prompts, page_sizes)
def test_a_partial_page_counts_unless_another_prompt_goes_on_from_it(requests: list[Request], page_size: int) -> None:
    wanted = full_pages(requests, page_size) + partial_pages(requests, page_size)
    assert count_all_pages(requests, page_size) == wanted


@given(any_prompts, page_sizes)
def test_a_cache_that_evicts_nothing_holds_exactly_the_distinct_pages(requests: list[Request], page_size: int) -> None:
    for whole_pages, count in ((True, count_full_pages), (False, count_all_pages)):
        cache = PrefixCache(PageAllocator(200, page_size), whole_pages=whole_pages)
        for seq_id, request in enumerate(requests):
            if request.num_tokens:
                cache.start(seq_id, request.token_ids(), min_uncached_tokens=0)
                cache.finish(seq_id)
        assert cache.manager.num_pages - cache.manager.available_pages_count == count(requests, page_size)


def test_the_pages_of_the_drawing_are_counted() -> None:
    requests = [TokenRequest(np.frombuffer(text, np.uint8)) for text in (b"abcdef", b"abcdghij", b"abcde")]
    assert count_full_pages(requests, 4) == 2
    assert count_all_pages(requests, 4) == 3


@pytest.mark.parametrize("count", [count_full_pages, count_all_pages])
def test_no_prompts_fill_no_page(count: object) -> None:
    assert callable(count)
    assert count([], 4) == 0


@given(any_prompts)
def test_common_prefixes_are_those_of_the_token_ids(requests: list[Request]) -> None:
    for left in requests:
        for right in requests:
            a, b = left.token_ids().tolist(), right.token_ids().tolist()
            same = [x == y for x, y in zip(a, b, strict=False)]
            assert left.common_prefix_len(right) == (same.index(False) if False in same else len(same))
