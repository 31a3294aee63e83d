"""Demoting, by hand; `test_prefix_cache_machine` compares it with the model, and `test_planted_bugs` breaks it."""

from __future__ import annotations

import pytest

from seqattn.errors import LengthError, TokenError
from tests.radix.state import eviction_order, snapshot
from tests.radix.world import live

#: [1 2 3 4]0 ── [5 6 7 8]1 ── [9]2        two answers to one question, and a prompt of its own, the oldest
#:            └─ [5 6 0 0]4 ── [8]5
#: [3 3 3]6
LIFE = (
    "start 6 [3,3,3] · finish 6 · start 0 [1,2,3,4,5,6,7,8,9] · finish 0 · "
    "start 1 [1,2,3,4,5,6,0,0,8] uncached 5 · finish 1"
)


def test_what_only_a_path_has_goes_first_and_its_end_before_all() -> None:
    world = live(4, 9, LIFE)
    before = eviction_order(world.cache.tree)
    world.live("demote 0 [1,2,3,4,5,6,0,0,8]")
    after = eviction_order(world.cache.tree)
    mine = [page for page in before if page not in after[2:]]
    assert after[:2] == [page for page in before if page in mine]
    assert after != before
    world.live("evict 1 · evict 1")
    assert world.cache.match([1, 2, 3, 4, 5, 6, 0, 0, 8]).num_tokens == 6
    assert world.cache.match([1, 2, 3, 4, 5, 6, 7, 8, 9]).num_tokens == 9


def test_what_is_after_the_cut_goes_and_the_page_of_the_cut_stays() -> None:
    for after, count in ((0, 4), (1, 3), (4, 3), (5, 2), (8, 2), (9, 1), (12, 1), (13, 0), (99, 0)):
        world = live(4, 9, "start 0 [1,2,3,4,5,6,7,8,9,10,11,12,13] · finish 0")
        assert world.cache.demote(range(1, 14), after=after) == count


@pytest.mark.parametrize("more", ["start 2 [1,2,3,4,5]", "pin 0 [1,2,3,4,5]", "start 2 [1,2,3,4,5,6] · finish 2"])
def test_what_is_held_or_continued_stays_where_it_is(more: str) -> None:
    world = live(4, 9, f"start 6 [3] · finish 6 · start 0 [1,2,3,4] · finish 0 · {more}")
    before = snapshot(world.cache)
    assert world.cache.demote([1, 2, 3, 4], after=0) == 0
    assert snapshot(world.cache) == before


def test_a_page_that_a_running_sequence_has_copied_is_nobodys() -> None:
    world = live(4, 9, "start 0 [1,2,3,4,5] · finish 0 · start 2 [1,2,3,4,5,6]")
    assert world.cache.demote([1, 2, 3, 4, 5], after=0) == 1


def test_what_is_demoted_is_like_any_other_page_once_it_is_used() -> None:
    world = live(4, 9, LIFE)
    world.live("demote 0 [1,2,3,4,5,6,7,8,9] · start 2 [1,2,3,4,5,6,7,8,9,1] · abort 2")
    last = eviction_order(world.cache.tree)
    assert world.cache.match([1, 2, 3, 4, 5, 6, 7, 8, 9]).tail_page in last[-3:]


def test_bad_values_are_refused_and_change_nothing() -> None:
    world = live(4, 9, LIFE)
    before = snapshot(world.cache)
    with pytest.raises(LengthError, match="after must be an integer of at least 0, not -1"):
        world.cache.demote([1, 2], after=-1)
    with pytest.raises(TokenError):
        world.cache.demote([-1], after=0)
    assert snapshot(world.cache) == before
