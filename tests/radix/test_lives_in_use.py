"""Short lives for the rules about running sequences, pins, namespaces and stats; see `test_lives.py`."""

from __future__ import annotations

import pytest

from tests.radix.state import eviction_order, tables
from tests.radix.world import live

# -- starting when pages are short ------------------------------------------------------------------------------------


def test_a_start_shares_what_it_can_and_evicts_for_the_rest() -> None:
    world = live(2, 4, "start 0 [1,1,2,2,3,3] · finish 0 · start 1 [1,1,5,5,6,6,7]")
    assert world.cached() == {(1, 1): 0}
    assert len(tables(world.cache)[1]) == 4


def test_the_tail_is_given_up_if_its_source_is_the_one_page_that_is_missing() -> None:
    # Two pages: [1 2]0 is cached. [1 9 9 9] needs both, so it cannot copy from page 0.
    world = live(2, 2, "start 0 [1,2] · finish 0")
    started = world.cache.start(1, [1, 9, 9, 9])
    assert (started.num_cached_tokens, started.forked) == (0, None)
    assert world.cached() == {}


def test_the_tail_is_kept_if_there_is_one_page_more() -> None:
    world = live(2, 3, "start 0 [1,2] · finish 0")
    started = world.cache.start(1, [1, 9, 9, 9])
    assert (started.num_cached_tokens, started.forked) == (1, (0, 1, 1))
    assert world.cached() == {(1, 2): 0}


def test_two_tails_of_one_source_are_given_up_together() -> None:
    world = live(2, 2, "start 0 [1,2] · finish 0 · start_many 1 [1,8] 2 [1,9]")
    assert sorted(page for table in tables(world.cache).values() for page in table) == [0, 1]


def test_only_as_many_tails_are_given_up_as_pages_are_missing() -> None:
    world = live(2, 5, "start 0 [1,2] · finish 0 · start 0 [3,4] · finish 0 · take 0 1")
    started = world.cache.start_many([1, 2], [[1, 9, 9], [3, 9]])
    assert sorted(s.num_cached_tokens for s in started) == [0, 1]


def test_starts_of_one_call_part_an_edge_one_after_the_other() -> None:
    # [2 0]0 ── [2]1 is one edge: the first prompt cuts it after page 0, the second copies from page 0.
    world = live(2, 9, "start 0 [2,0,2] · finish 0 · start_many 1 [2,0] 2 [2] uncached 0")
    assert tables(world.cache)[1] == [0]


def test_no_page_error_comes_before_anything_is_evicted() -> None:
    world = live(2, 3, "start 0 [1,1,2,2] · finish 0 · start 1 [9] · start 2 [3,3,4,4,5] · start 2 [1,1,3,3,4,4]")
    assert world.num_short == 2
    assert world.cached() == {(1, 1): 0, (1, 1, 2, 2): 1}


def test_a_prompt_does_not_evict_what_it_shares() -> None:
    world = live(2, 3, "start 0 [1,1,2,2] · finish 0 · start 1 [1,1,2,2,3,3]")
    assert tables(world.cache) == {1: [0, 1, 2]}


# -- only written KV is published -------------------------------------------------------------------------------------


def test_publish_puts_full_pages_only_and_finish_the_tail_as_well() -> None:
    world = live(4, 4, "start 0 [1,2,3,4,5,6] · publish 0")
    assert world.cached() == {(1, 2, 3, 4): 0}
    world.live("finish 0")
    assert world.cached() == {(1, 2, 3, 4): 0, (1, 2, 3, 4, 5, 6): 1}


def test_tokens_whose_kv_is_not_written_are_not_published() -> None:
    world = live(4, 4, "start 0 [1,2,3,4,5] · compute 0 · extend 0 [6,7,8,9] · publish 0 5")
    assert world.cached() == {(1, 2, 3, 4): 0}
    world.live("finish 0 5")
    assert world.cached() == {(1, 2, 3, 4): 0, (1, 2, 3, 4, 5): 1}
    assert world.memory.available_pages_count == 2


def test_finishing_no_token_publishes_nothing() -> None:
    world = live(4, 4, "start 0 [1,2,3,4,5] · finish 0 0")
    assert world.cached() == {}
    assert world.memory.available_pages_count == 4


def test_what_abort_lets_go_of_was_not_published() -> None:
    assert live(4, 4, "start 0 [1,2,3,4,5] · compute 0 · abort 0").cached() == {}


# -- namespaces -------------------------------------------------------------------------------------------------------


def test_nothing_is_shared_across_namespaces() -> None:
    world = live(2, 8, "start 0 [1,1] in b · finish 0 · start 0 [1,1] · finish 0 · match [1,1] in b · match [1,1] in c")
    assert world.cached() == {(1, 1): 1}
    assert world.cached("b") == {(1, 1): 0}


def test_eviction_order_is_common_to_all_namespaces() -> None:
    world = live(2, 8, "start 0 [1,1] in b · finish 0 · start 0 [1,1] · finish 0 · start 0 [2,2] in b · finish 0")
    assert eviction_order(world.cache.tree) == [0, 1, 2]


# -- fork, truncate, pin, clear ---------------------------------------------------------------------------------------


def test_a_cut_inside_a_cached_page_keeps_sharing_it_until_the_sequence_grows() -> None:
    world = live(4, 4, "start 0 [1,2,3,4,5] · publish 0 · truncate 0 2")
    assert tables(world.cache) == {0: [0]}
    world.live("extend 0 [9]")
    assert world.cached() == {(1, 2, 3, 4): 0}
    assert tables(world.cache)[0] != [0]
    world.live("finish 0")
    assert set(world.cached()) == {(1, 2, 3, 4), (1, 2, 9)}


def test_a_pin_keeps_the_partly_matched_last_page() -> None:
    world = live(4, 4, "start 0 [1,2,3,4] · finish 0 · pin 0 [1,2] · evict 4")
    assert world.cached() == {(1, 2, 3, 4): 0}
    world.live("unpin 0 · evict 4")
    assert world.cached() == {}


def test_a_pin_that_misses_keeps_nothing() -> None:
    world = live(4, 4, "pin 0 [1] · start 0 [1] · finish 0 · evict 1 · unpin 0")
    assert world.cached() == {}


def test_pins_of_one_prefix_may_end_in_any_order() -> None:
    live(2, 8, "start 0 [1,1,2,2] · finish 0 · pin 0 [1,1] · pin 1 [1,1,2,2] · unpin 0 · evict 2 · unpin 1").end()


def test_after_clear_what_runs_publishes_nothing_and_pins_hold_nothing() -> None:
    life = "start 0 [1,1,2] · publish 0 · pin 0 [1,1] · clear · publish 0 · fork 0 1 · finish 0 · publish 1 · unpin 0"
    world = live(2, 8, life)
    assert world.cached() == {}
    world.live("start 2 [1,1] · finish 2 · finish 1")
    assert len(world.cached()) == 1
    world.end()


def test_whole_pages_turns_tails_off() -> None:
    life = "start 0 [1,2,3,4,5,6] · finish 0 · start 1 [1,2,3,4,5,6,7]"
    world = live(4, 8, life, whole_pages=True)
    assert world.cached() == {(1, 2, 3, 4): 0}
    assert world.cache.stats.num_hit_tokens == 4
    assert live(4, 8, life).cache.stats.num_hit_tokens == 6


# -- stats ------------------------------------------------------------------------------------------------------------


def test_a_request_retried_after_preemption_counts_once() -> None:
    world = live(2, 8, "start 0 [1,2] · finish 0 · start 1 [1,2,3] · extend 1 [4] · abort 1 · start 1 [1,2,3,4]")
    assert (world.cache.stats.num_query_tokens, world.cache.stats.num_hit_tokens) == (5, 2)


@pytest.mark.parametrize(
    "life",
    [
        "start 1 [0] · abort 1 · start 1 [0] in b",
        "start 1 [0] · truncate 1 0 · abort 1 · start 1 [2]",
        "start 1 [0] · finish 1 0 · start 1 [0]",
        "start 1 [0] · abort 1 · start 1 [2]",
        "start 1 [0] · abort 1 · start 2 [0]",
    ],
)
def test_another_request_is_no_retry(life: str) -> None:
    assert live(2, 8, life).cache.stats.num_query_tokens == 2


def test_stats_count_pages_shared_forked_evicted_and_adopted() -> None:
    stats = live(2, 4, "start 0 [1,1,2] · finish 0 · start 1 [1,1,2,3] · finish 1 · evict 4").cache.stats
    assert (stats.num_shared_pages, stats.num_forked_pages, stats.num_evicted_pages) == (1, 1, 2)
    assert (stats.num_query_tokens, stats.num_hit_tokens, stats.num_adopted_pages) == (7, 3, 0)
