"""The tree as text and as HTML, and the counters, as a person reads them."""

from __future__ import annotations

import re

import radix
from radix.show import draw, draw_html
from radix.tree import RadixTree
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
