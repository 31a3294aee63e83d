"""How many pages a trace fills: what a cache without a limit would hold at the end.

Prompts form a trie. Sorted, each prompt adds to the one before only what follows their common prefix:

    sorted prompts    pages of 4      new full pages             partial page
    a b c d e         abcd e          abcd                  1    e..  the next prompt goes on with it: not stored
    a b c d e f       abcd ef         -                     0    ef.                                1
    a b c d g h i j   abcd ghij       ghij                  1    -                                  0

which makes 2 full pages, and 3 pages with tails. No tree is needed and no page is ever looked at twice, so the count is
exact at any page size, and independent of the cache whose capacity it decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from radix.replay.request import Request

__all__ = ["count_all_pages", "count_full_pages"]


def count_full_pages(requests: Iterable[Request], page_size: int) -> int:
    """Distinct full pages: pages with the same tokens after the same prefix are one. O(tokens · log requests)."""
    return sum(
        request.num_tokens // page_size - shared // page_size for request, shared, _ in _in_sorted_order(requests)
    )


def count_all_pages(requests: Iterable[Request], page_size: int) -> int:
    """Distinct pages with the partly filled last ones, each counted unless another page begins with its tokens."""
    return sum(
        request.num_tokens // page_size - shared // page_size + (request.num_tokens % page_size > 0 and not goes_on)
        for request, shared, goes_on in _in_sorted_order(requests)
    )


def _in_sorted_order(requests: Iterable[Request]) -> Iterator[tuple[Request, int, bool]]:
    """Each prompt, the tokens it shares with the one before, and whether the next one begins with all of it."""
    ordered = sorted(requests, key=lambda request: request.sort_key())
    shared = 0
    for request, after in pairwise(ordered):
        shared_after = request.common_prefix_len(after)
        yield request, shared, shared_after == request.num_tokens
        shared = shared_after
    if ordered:
        yield ordered[-1], shared, False
