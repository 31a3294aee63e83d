"""Short lives, each for one rule of the design; a `World` compares every step of them with the model as well.

A picture shows what the tree holds afterwards: `[tokens]page`, edges cut at pages, siblings one below the other.
"""

from __future__ import annotations

import pytest

from tests.radix.lives import Tokens
from tests.radix.state import eviction_order, snapshot, tables
from tests.radix.world import World, live

# -- nodes ------------------------------------------------------------------------------------------------------------


def test_only_a_leaf_ends_in_a_partly_filled_page() -> None:
    # [1 2 3 4]0 ── [5 6]1
    world = live(4, 4, "start 0 [1,2,3,4,5,6] · finish 0")
    assert world.cached() == {(1, 2, 3, 4): 0, (1, 2, 3, 4, 5, 6): 1}


def test_siblings_that_part_inside_a_page_have_a_page_each() -> None:
    # [1 2 3 4]0
    # [1 2 9]1      slots 0 and 1 are a copy of page 0's
    world = live(4, 4, "start 0 [1,2,3,4] · finish 0 · start 1 [1,2,9] · finish 1")
    assert world.cached() == {(1, 2, 3, 4): 0, (1, 2, 9): 1}
    assert world.memory.slots[1][:2] == world.memory.slots[0][:2]


def test_many_siblings_inside_one_page_are_told_apart() -> None:
    life = " · ".join(f"start {n} [7,{n},{n % 3}] · finish {n}" for n in range(8))
    world = live(4, 8, life)
    for n in range(8):
        found = world.cache.match([7, n, n % 3, 5])
        assert (found.num_tokens, found.tail_page, found.tail_len) == (3, n, 3)


def test_a_token_id_of_more_than_a_byte_is_not_taken_for_another() -> None:
    world = live(2, 6, "start 0 [1,256] · finish 0 · start 1 [256,1] · finish 1 · start 2 [65536,1] · finish 2")
    assert world.cached() == {(1, 256): 0, (256, 1): 1, (65536, 1): 2}
    assert world.cache.match([65536, 256]).num_tokens == 1


def test_a_namespace_that_holds_nothing_has_no_root() -> None:
    world = live(4, 4, "start 0 [1,2] in b · finish 0 · evict 1")
    assert not world.cache.tree.roots


# -- match ------------------------------------------------------------------------------------------------------------


def test_match_is_exact_to_the_token() -> None:
    world = live(4, 4, "start 0 [1,2,3,4,5,6] · finish 0")
    for query, expected in (
        ([1, 2, 3, 4, 5, 6, 7], (6, [0], 1, 2)),
        ([1, 2, 3, 4, 5, 9], (5, [0], 1, 1)),
        ([1, 2, 3, 4, 9], (4, [0], None, 0)),
        ([1, 2, 9], (2, [], 0, 2)),
        ([9], (0, [], None, 0)),
        ([], (0, [], None, 0)),
    ):
        found = world.cache.match(query)
        assert (found.num_tokens, found.pages.tolist(), found.tail_page, found.tail_len) == expected


def test_match_changes_nothing_not_even_how_edges_are_split() -> None:
    world = live(2, 8, "start 0 [1,2,3,4,5,6] · finish 0 · start 1 [7] · finish 1")
    before, num_nodes = snapshot(world.cache), len(list(world.cache.tree))
    stamps = [node.stamp for node in world.cache.tree]
    for query in ([1, 2, 3], [1, 2, 3, 4], [1], [7, 7], [8]):
        world.cache.match(query)
        world.cache.can_start(query)
    assert snapshot(world.cache) == before
    assert (len(list(world.cache.tree)), [node.stamp for node in world.cache.tree]) == (num_nodes, stamps)


# -- adopt ------------------------------------------------------------------------------------------------------------


def test_a_prefix_is_never_stored_twice() -> None:
    # Both computed [1 2 3 4]: the second takes page 0 and gives page 2 back.
    world = live(4, 6, "start 0 [1,2,3,4,5] · start 1 [1,2,3,4,6] · compute 0 · publish 0 4 · compute 1 · publish 1")
    assert tables(world.cache) == {0: [0, 1], 1: [0, 3]}
    assert world.memory.ref_count.tolist() == [3, 1, 0, 1, 0, 0]
    assert world.cache.stats.num_adopted_pages == 1


def test_packing_after_publish_gives_the_pages_of_the_tree() -> None:
    world = live(4, 6, "start 0 [1,2,3,4,5] · start 1 [1,2,3,4,6] · finish 0 · compute 1")
    before = world.cache.pack_for_flashinfer([1]).kv_page_indices.tolist()
    world.live("publish 1")
    assert before == [2, 3]
    assert world.cache.pack_for_flashinfer([1]).kv_page_indices.tolist() == [0, 3]


def test_forks_adopt_with_the_sequence_that_they_share_a_page_with() -> None:
    # The first of the two lives that broke a first model.
    world = live(2, 8, "start 0 [0,1,1,0] · start 1 [0,1,1,0,1,1] · finish 0 · fork 1 2 · finish 2")
    assert tables(world.cache) == {1: [0, 1, 4]}
    assert world.cached() == {(0, 1): 0, (0, 1, 1, 0): 1, (0, 1, 1, 0, 1, 1): 4}
    world.end()


def test_a_fork_that_was_cut_inside_an_adopted_page_adopts_it_too() -> None:
    world = live(4, 8, "start 0 [1,2,3,4] · start 1 [1,2,3,4,5] · fork 1 2 · truncate 2 2 · finish 0 · publish 1")
    assert tables(world.cache) == {1: [0, 2], 2: [0]}
    world.live("extend 2 [9]")
    assert world.memory.slots[tables(world.cache)[2][0]][:2] == world.memory.slots[0][:2]


def test_a_prefix_of_what_is_cached_adds_nothing() -> None:
    world = live(4, 4, "start 0 [1,2,3,4] · start 1 [1,2,3] · finish 0 · finish 1")
    assert world.cached() == {(1, 2, 3, 4): 0}
    assert world.memory.available_pages_count == 3


def test_a_fuller_tail_takes_the_place_of_the_one_it_extends() -> None:
    # [1 2]0  ⟹  [1 2 3 4]1 ── [5]2
    world = live(4, 4, "start 0 [1,2] · finish 0 · start 1 [1,2,3,4,5] · finish 1")
    assert world.cached() == {(1, 2, 3, 4): 1, (1, 2, 3, 4, 5): 2}
    assert world.memory.ref_count.tolist() == [0, 1, 1, 0]


def test_a_fuller_tail_leaves_its_siblings_alone() -> None:
    # [1 2]0 and [1 9]1, then [1 2 3]2 in the place of [1 2]
    world = live(4, 4, "start 0 [1,2] · finish 0 · start 1 [1,9] · finish 1 · start 2 [1,2,3] · finish 2")
    assert world.cached() == {(1, 9): 1, (1, 2, 3): 2}


def test_a_pin_follows_the_page_that_replaces_what_it_holds() -> None:
    # The second of the two lives that broke a first model.
    world = live(2, 4, "start 0 [0] · finish 0 · pin 0 [0] · start 1 [0,1,1] · finish 1")
    assert world.cached() == {(0, 1): 1, (0, 1, 1): 2}
    assert world.memory.ref_count.tolist() == [0, 2, 1, 0]
    world.live("unpin 0")
    assert world.memory.ref_count.tolist() == [0, 1, 1, 0]
    world.end()


def test_every_pin_follows() -> None:
    world = live(2, 4, "start 0 [0] · finish 0 · pin 0 [0] · pin 1 [0,5] · start 1 [0,1,1] · finish 1 · unpin 0")
    assert world.memory.ref_count.tolist() == [0, 2, 1, 0]
    world.end()


def test_a_pin_on_a_long_edge_follows_its_last_page_only() -> None:
    # [1 1 2]2 3 is one edge, pinned; then [1 1 2 3] replaces page 3 by 1 and takes page 2 for its own 0.
    world = live(2, 6, "start 1 [1,1,2,3,4] · start 0 [1,1,2] · finish 0 · pin 0 [1,1,2] · finish 1")
    assert world.cached() == {(1, 1): 3, (1, 1, 2, 3): 1, (1, 1, 2, 3, 4): 2}
    assert world.memory.ref_count.tolist() == [0, 2, 1, 2, 0, 0]
    world.end()


def test_on_the_same_page_only_the_key_grows() -> None:
    # Sequences 0 and 1 hold page 0; 0 is cut to [1 2 3] and finished, then 1 publishes all four tokens.
    world = live(4, 4, "start 0 [1,2,3,4] · fork 0 1 · truncate 0 3 · finish 0")
    assert world.cached() == {(1, 2, 3): 0}
    world.live("publish 1")
    assert world.cached() == {(1, 2, 3, 4): 0}
    assert world.memory.ref_count.tolist() == [2, 0, 0, 0]


def test_a_fork_with_more_tokens_on_its_page_does_not_take_a_tail_that_has_fewer() -> None:
    # Tree: [1 2 3]0 from 9. Sequence 0, cut to [1 2 3], gives page 1 back; its fork needs slot 3 of page 1.
    life = "start 9 [1,2,3] · start 0 [1,2,3,4] · fork 0 1 · truncate 0 3 · finish 9 · finish 0"
    world = live(4, 4, life)
    assert tables(world.cache) == {1: [1]}
    assert world.cached() == {(1, 2, 3): 0}
    world.end()


def test_a_sequence_whose_tail_was_replaced_in_the_tree_keeps_its_page() -> None:
    # Tree: [1 2 3]0, held by 1 for [1 2 3 4]; then [1 2 3 9]1 takes its place.
    world = live(4, 4, "start 0 [1,2,3,4] · fork 0 1 · truncate 0 3 · finish 0 · start 2 [1,2,3,9] · finish 2")
    assert world.cached() == {(1, 2, 3, 9): 1}
    assert tables(world.cache) == {1: [0]}
    world.live("finish 1")
    assert world.cached() == {(1, 2, 3, 9): 1, (1, 2, 3, 4): 0}


def test_a_fork_shares_nothing_with_the_tree_when_what_its_parent_finished_added_nothing() -> None:
    # Sequence 1 finishes [0], a prefix of the cached [0 1]; that is evicted, then the fork 2 publishes [0 0].
    life = "start 0 [0,1] · finish 0 · start 1 [0,0] uncached 5 · fork 1 2 · finish 1 1 · evict 1 · publish 2"
    world = live(2, 3, life)
    assert world.cached() == {(0, 0): 1}
    world.end()


# -- recency ----------------------------------------------------------------------------------------------------------


def first_evicted(world: World) -> Tokens:
    before = world.cached()
    world.live("evict 1")
    (gone,) = before.keys() - world.cached().keys()
    return gone


TWO = "start 0 [1,1] · finish 0 · start 0 [2,2] · finish 0"


@pytest.mark.parametrize(
    ("life", "gone"),
    [
        ("match [1,1]", (1, 1)),
        ("start 1 [1,1,3] · finish 1 0", (2, 2)),
        ("start 1 [1,1,3] · abort 1", (2, 2)),
        ("start 1 [1,1,3] · start 2 [2,2,3] · abort 2 · truncate 1 0", (2, 2)),
        ("pin 0 [1,1] · start 2 [2,2,3] · abort 2 · unpin 0", (2, 2)),
        ("start 1 [1,1] uncached 0 · start 2 [2,2,3] · truncate 1 1 · abort 2 · extend 1 [7]", (2, 2)),
        ("start 1 [1,9] · abort 1", (2, 2)),
        ("start 1 [1,1,3] · publish 1 · start 2 [2,2,3] · abort 2 · finish 1 2", (2, 2)),
        ("hold 0 [1,1] · let_go 0", (1, 1)),
    ],
    ids=[
        "match is no use",
        "finish is",
        "abort is",
        "truncate is, of what it gives back",
        "the end of a pin is",
        "extend is, of the cut page that it copies",
        "start is, of the page that the tail is forked from",
        "finish after publish is",
        "references by hand are none",
    ],
)
def test_what_counts_as_a_use(life: str, gone: Tokens) -> None:
    assert first_evicted(live(2, 8, f"{TWO} · {life}")) == gone


def test_pages_go_one_by_one_from_the_tail_of_the_oldest_leaf() -> None:
    world = live(2, 8, "start 0 [1,1,1,1,1] · finish 0 · start 0 [2,2] · finish 0")
    assert [first_evicted(world) for _ in range(4)] == [(1,) * 5, (1,) * 4, (1,) * 2, (2, 2)]


def test_evict_frees_exactly_as_many_pages_as_it_is_asked_for() -> None:
    world = live(2, 8, "start 0 [1,1,1,1,1] · finish 0")
    assert [world.cache.evict(2), world.cache.evict(2), world.cache.evict(2)] == [2, 1, 0]


def test_a_prefix_outlives_what_hangs_from_it() -> None:
    # [1 1]0 ── [2 2]1
    #        └─ [3 3]2     the second start used [1 1] last: it goes last
    world = live(2, 8, "start 0 [1,1,2,2] · finish 0 · start 0 [1,1,3,3] · finish 0")
    assert eviction_order(world.cache.tree) == [1, 2, 0]


def test_what_becomes_idle_together_goes_deepest_first() -> None:
    world = live(1, 8, "start 0 [1,2,3] · publish 0 · start 1 [9] · finish 1 · finish 0")
    assert [first_evicted(world) for _ in range(4)] == [(9,), (1, 2, 3), (1, 2), (1,)]


def test_a_split_edge_keeps_its_age_below_the_cut() -> None:
    # [1 2 3]: [1] is used again by a start that shares only its first page; [1 2 3] and [1 2] are as old as before.
    life = "start 0 [1,2,3] · finish 0 · start 0 [9] · finish 0 · start 1 [1,5] · abort 1"
    world = live(1, 8, life)
    assert [first_evicted(world) for _ in range(4)] == [(1, 2, 3), (1, 2), (9,), (1,)]
