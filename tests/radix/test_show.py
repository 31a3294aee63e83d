"""The tree as text and as HTML, and the counters, as a person reads them."""

from __future__ import annotations

import re

import numpy as np
import pytest

import radix
from radix.show import MOST_LINES, draw, draw_html
from radix.tokens import as_key
from radix.tree import RadixTree
from seqattn.errors import InvariantError
from tests.radix.world import live

LIFE = "start 0 [5,6,7,8] · finish 0 · start 1 [5,6,9] in b · finish 1 · start 2 [5,6,1,2,3,4,5,6,7,8,9,9,9] · finish 2"


def test_the_tree_is_drawn_one_edge_a_line() -> None:
    world = live(2, 12, LIFE + " · start 3 [5,6,7,8,1]")
    assert re.sub(r" · used at \d+", "", world.cache.show()) == (
        "namespace None\n"
        "└── [5 6] 2 tokens · page 0 · held by 1\n"
        "    ├── [1 2 3 4 5 … 9] 11 tokens · pages 4 5 6 7 8 9 · idle\n"
        "    └── [7 8] 2 tokens · page 1 · held by 1\n"
        "namespace 'b'\n"
        "└── [5 6 9] 3 tokens · pages 2 3 · idle"
    )


def test_an_empty_tree_says_so() -> None:
    assert draw(RadixTree(4)) == "(empty)"


def test_a_drawing_may_be_cut_and_counts_what_is_left_out() -> None:
    tree = live(2, 12, LIFE + " · start 3 [5,6,7,8,1]").cache.tree
    lines = draw(tree).splitlines()
    assert len(lines) == 6, "two namespaces and four edges"
    for most, rest in ((0, 4), (1, 4), (2, 3), (3, 2), (4, 1), (5, 1)):
        more = f"… and {rest} more edge{'s' * (rest > 1)}"
        assert draw(tree, most_lines=most).splitlines() == [*lines[:most], more]
    assert draw(tree, most_lines=6) == draw(tree, most_lines=99) == draw(tree)


def test_an_error_about_a_large_tree_is_short() -> None:
    tree = RadixTree(1)
    for token in range(2000):
        tree.insert(as_key([token]), np.array([token], dtype=np.int32).tobytes())
    tree.num_pages += 1
    with pytest.raises(InvariantError, match="T6") as error:
        tree.check()
    assert str(error.value).endswith(f"… and {2001 - MOST_LINES:,} more edges")
    assert len(str(error.value)) < 100 * MOST_LINES


def test_tokens_may_be_shown_as_text() -> None:
    shown = live(2, 12, LIFE).cache.show(decode=lambda ids: "".join(chr(96 + token) for token in ids))
    assert "'ef' 2 tokens" in shown


def test_the_html_page_nests_as_the_tree_does() -> None:
    world = live(2, 12, LIFE)
    page = draw_html(world.cache.tree, decode=lambda ids: f"<{len(ids)}>")
    assert page.count("<details") == page.count("</details>") == len(list(world.cache.tree))
    assert "&lt;2&gt;" in page
    assert "<2>" not in page
    assert page.index("2 tokens") < page.index("11 tokens") < page.index("namespace &#x27;b&#x27;")
    assert page.endswith("</body></html>")


def test_nodes_say_what_they_are_without_their_tokens() -> None:
    world = live(2, 12, "start 0 [5,6,7] · publish 0")
    assert [repr(node) for node in world.cache.tree] == ["<Node 2 tokens, 1 pages, held by 1, used at 2>"]


def test_ages_and_reuses_of_evicted_pages_are_counted() -> None:
    stats = live(2, 4, "start 0 [1,1,2] · finish 0 · start 1 [1,1,3] · finish 1 · evict 4").cache.stats
    assert sum(stats.evicted_ages) == sum(stats.evicted_reuses) == stats.num_evicted_pages == 3
    assert stats.evicted_reuses[:3] == [2, 1, 0], "[1 1] was shared once, the others never"
    assert stats.num_miss_tokens == 4
    assert stats.hit_rate == 2 / 6


def test_a_cache_that_did_nothing_has_no_hit_rate() -> None:
    assert live(2, 4, "clear").cache.stats.hit_rate == 0


def test_the_package_names_what_it_has() -> None:
    assert dir(radix) == list(radix.__all__) == sorted(radix.__all__)
    for name in radix.__all__:
        assert getattr(radix, name).__name__ == name
    assert not hasattr(radix, "Nothing")
