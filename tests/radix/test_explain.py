"""What `explain` says, beside a diary of which prefixes were cached before each call and which were after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from radix import history as history_module
from radix import reserve as reserve_module
from radix.cache import PrefixCache
from radix.history import History
from seqattn import PageAllocator
from seqattn.errors import LengthError, TokenError
from tests.radix.diary import DiaryWorld
from tests.radix.driver import LifeError, assert_lives, random_life
from tests.radix.state import snapshot
from tests.radix.world import World


def small_history(*args: Any, **kwargs: Any) -> DiaryWorld:  # noqa: ANN401  as World
    return DiaryWorld(*args, cache_class=partial(PrefixCache, history=4), **kwargs)


def no_history(*args: Any, **kwargs: Any) -> DiaryWorld:  # noqa: ANN401  as World
    return DiaryWorld(*args, cache_class=partial(PrefixCache, history=0), **kwargs)


def few_bytes(*args: Any, **kwargs: Any) -> DiaryWorld:  # noqa: ANN401  as World
    world = DiaryWorld(*args, **kwargs)
    world.cache.state.history.most_bytes = 100
    return world


@pytest.mark.parametrize("make", [DiaryWorld, small_history, no_history, few_bytes])
def test_in_random_lives_every_reason_is_the_one_in_the_diary(make: Callable[..., World]) -> None:
    assert_lives(1000, 40, 100, make)


def test_with_a_long_history_every_loss_is_told_and_every_kind_of_reason_occurs() -> None:
    worlds: list[DiaryWorld] = []

    def make(*args: Any, **kwargs: Any) -> DiaryWorld:  # noqa: ANN401  as World
        worlds.append(DiaryWorld(*args, **kwargs))
        return worlds[-1]

    for seed in range(1000, 1030):
        random_life(seed, 100, make)
    assert {reason for world in worlds for reason in world.num_explained} == {
        "evicted",
        "never published",
        "whole pages only",
    }
    for world in worlds:
        assert world.cache.state.history.forgotten_at is None


# -- bugs that the diary must find -------------------------------------------------------------------------------------


def forgets_the_rest_of_a_path(patch: pytest.MonkeyPatch) -> None:
    real = history_module._common
    patch.setattr(history_module, "_common", lambda keys, query: real(keys[-1:], query))


def tells_the_first_loss_instead_of_the_last(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(history_module, "reversed", iter, raising=False)


def mixes_namespaces_up(patch: pytest.MonkeyPatch) -> None:
    real = History.losses
    patch.setattr(History, "losses", lambda self, query, _namespace, start: real(self, query, None, start))


def forgets_what_is_above_a_leaf_that_is_trimmed_again(patch: pytest.MonkeyPatch) -> None:
    real = History.note

    def note(self: History, node: Any, count: int, cause: Any, page_bytes: int) -> None:  # noqa: ANN401
        known: Any = self._node
        if node is known:
            self._left = len(known.key)
        real(self, node, count, cause, page_bytes)

    patch.setattr(History, "note", note)


def is_a_page_off(patch: pytest.MonkeyPatch) -> None:
    real = History.note
    patch.setattr(History, "note", lambda self, node, count, *rest: real(self, node, max(1, count - 1), *rest))


def notes_nothing_of_a_page_evicted_by_hand(patch: pytest.MonkeyPatch) -> None:
    real = History.note

    def note(self: History, node: Any, count: int, cause: Any, page_bytes: int) -> None:  # noqa: ANN401
        if cause[1] != "evict":
            real(self, node, count, cause, page_bytes)

    patch.setattr(History, "note", note)


def names_another_call(patch: pytest.MonkeyPatch) -> None:
    real = reserve_module.Reserve.commit
    patch.setattr(reserve_module.Reserve, "commit", lambda self, pages, _call, ids: real(self, pages, "start", ids))


def keeps_its_records_through_a_clear(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(History, "clear", lambda self, tick: setattr(self, "cleared_at", tick))


def forgets_the_newest_first(patch: pytest.MonkeyPatch) -> None:
    def drop(self: History) -> None:
        self.forgotten_at = self._records.pop()[0][0]

    patch.setattr(History, "_drop", drop)


@pytest.mark.parametrize(
    "plant",
    [
        forgets_the_rest_of_a_path,
        tells_the_first_loss_instead_of_the_last,
        mixes_namespaces_up,
        forgets_what_is_above_a_leaf_that_is_trimmed_again,
        is_a_page_off,
        notes_nothing_of_a_page_evicted_by_hand,
        names_another_call,
        keeps_its_records_through_a_clear,
        forgets_the_newest_first,
    ],
)
def test_the_diary_finds_a_history_that(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    make = small_history if plant is forgets_the_newest_first else DiaryWorld
    with pytest.raises(LifeError) as found:
        sum((random_life(seed, 100, make) for seed in range(1000, 1040)), Counter())
    assert isinstance(found.value.error, AssertionError), found.value.error


# -- by hand -----------------------------------------------------------------------------------------------------------


def letters(ids: list[int]) -> str:
    return "".join(chr(96 + token) for token in ids)


def used(num_pages: int = 8, **options: Any) -> PrefixCache:  # noqa: ANN401  as PrefixCache
    """[a b c d e f g h] with two branches, of which the older one was evicted in part."""
    cache = PrefixCache(PageAllocator(num_pages, 4), **options)
    for name, tail in (("ann", [9] * 12), ("ben", [7] * 14)):
        cache.start(name, [*range(1, 9), *tail])
        cache.finish(name)
    return cache


def test_an_explanation_reads_like_this() -> None:
    query = [*range(1, 9), *[9] * 13]
    cache = used()
    assert str(cache.explain([*query[:20], 2, 2], decode=letters)) == (
        "22 tokens asked: 16 cached, 6 missing\n"
        "what is cached ends at token 16, after 'iiiiiiii'\n"
        "    asked    'iiiibb'\n"
        "16 to 20: evicted at tick 2 by start of 'ben', which wanted 4 pages: 3 free, 3 idle, 2 in use\n"
        "20 to 22: never published"
    )
    cache.start("cem", query, namespace="b")
    cache.publish("cem", num_tokens=12)
    assert str(cache.explain(query)) == (
        "21 tokens asked: 8 cached, 13 missing\n"
        "what is cached ends at token 8, after [1, 2, 3, 4, 5, 6, 7, 8]\n"
        "    asked    [9, 9, 9, 9, 9, 9, 9, 9]\n"
        "8 to 16: evicted at tick 4 by start of 'cem', which wanted 6 pages: 0 free, 8 idle, 0 in use\n"
        "16 to 20: evicted at tick 2 by start of 'ben', which wanted 4 pages: 3 free, 3 idle, 2 in use\n"
        "20 to 21: never published\n"
        "12 of them match in namespace 'b'"
    )
    assert str(cache.explain([*query[:18], 3, 3], namespace="b", decode=letters)) == (
        "20 tokens asked: 12 cached, 8 missing\n"
        "what is cached ends at token 12, after 'efghiiii'\n"
        "    asked    'iiiiiicc'\n"
        "12 to 20: never published\n"
        "18 of them are sequence 'cem''s, not published yet"
    )


def test_the_two_sides_of_a_divergence_are_shown() -> None:
    divergence = used(num_pages=20).explain([*range(1, 9), 7, 7, 2, 9], decode=letters).divergence
    assert divergence is not None
    assert (divergence.position, divergence.asked, divergence.cached) == (10, (2, 9), (7,) * 8)
    assert str(divergence) == "they part at token 10, after 'cdefghgg'\n    asked    'bi'\n    cached   'gggggggg'"


def test_of_several_branches_the_last_used_is_shown() -> None:
    cache = used(num_pages=20)
    for token in (9, 7):
        cache.start("x", [*range(1, 9), token, token, token, token])
        cache.abort("x")
        found = cache.explain([*range(1, 9), 5]).divergence
        assert found is not None
        assert found.cached == (token,) * 8


def test_what_nothing_is_known_of_is_said_to_be_so() -> None:
    never, cleared, switched_off, forgotten = used(), used(), used(history=0), used(history=1)
    cleared.clear()
    forgotten.start("x", [5] * 12)
    switched_off.evict(2)
    for cache, said in (
        (never, "8 to 9: never published"),
        (cleared, "0 to 9: never published since the clear at tick 4"),
        (switched_off, "8 to 9: never published or evicted: no history is kept"),
        (forgotten, "8 to 9: never published, or evicted at tick 4 or before: the history does not go back so far"),
    ):
        assert str(cache.explain([*range(1, 9), 5])).splitlines()[-1] == said


def test_a_cache_of_whole_pages_says_what_it_does_not_share() -> None:
    cache = PrefixCache(PageAllocator(8, 4), whole_pages=True)
    cache.start("a", range(8))
    cache.finish("a")
    said = str(cache.explain([0, 1, 2, 3, 4, 5, 9])).splitlines()
    assert said[0] == "7 tokens asked: 4 cached, 3 missing"
    assert said[-2:] == ["4 to 6: cached, but only whole pages are shared", "6 to 7: never published"]


def test_all_cached_needs_no_reason() -> None:
    assert str(used().explain(range(1, 9))) == "8 tokens asked: 8 cached, 0 missing"
    assert str(used().explain([])) == "0 tokens asked: 0 cached, 0 missing"


def test_a_long_leaf_trimmed_page_by_page_is_kept_once() -> None:
    cache = PrefixCache(PageAllocator(512, 4))
    cache.start("a", list(range(2048)))
    cache.finish("a")
    while cache.evict(1):
        pass
    history = cache.state.history
    assert (len(history), history.num_bytes) == (512, 2048 * 4)
    assert [part.start for part in cache.explain(range(2048)).missing] == list(range(0, 2048, 4))


def test_a_history_is_bounded_in_records_and_in_bytes() -> None:
    cache = PrefixCache(PageAllocator(64, 4), history=10)
    for turn in range(200):
        cache.start("a", [turn] * 40)
        cache.finish("a")
    history = cache.state.history
    assert len(history) == 10
    ways = {id(way): way for _, way, _, _ in history._records}.values()
    kept = {id(key): len(key) for _, keys, _ in ways for key in keys}
    assert history.num_bytes >= sum(kept.values())
    assert history.num_bytes == sum(sum(map(len, keys)) for _, keys, _ in ways)
    history.most_bytes = 500
    cache.start("a", [999] * 40)
    assert history.num_bytes <= 500
    assert 0 < len(history) < 10


def test_a_record_longer_than_the_bound_is_not_kept() -> None:
    cache = PrefixCache(PageAllocator(8, 4))
    cache.state.history.most_bytes = 8
    cache.start("a", range(32))
    cache.finish("a")
    for _ in range(3):
        cache.evict(1)
    assert (len(cache.state.history), cache.state.history.num_bytes) == (0, 0)
    assert [part.reason for part in cache.explain(range(32)).missing] == ["unknown"]


def test_a_leaf_that_grew_since_it_was_trimmed_is_told_from_what_it_was() -> None:
    cache = PrefixCache(PageAllocator(16, 4))
    cache.start("a", range(16))
    cache.finish("a")
    cache.evict(1)
    prompt = [*range(12), *range(90, 98)]
    cache.start("b", prompt)
    cache.finish("b")
    assert len(list(cache.tree)) == 1  # its edge grew in place
    cache.evict(1)
    assert [(part.start, part.stop, part.reason) for part in cache.explain(prompt).missing] == [(16, 20, "evicted")]
    assert [part.start for part in cache.explain(range(16)).missing] == [12]


def test_what_is_noted_copies_no_tokens() -> None:
    cache = used(num_pages=20)
    edges = [node.key for node in cache.tree]
    cache.evict(1)
    *_, (_, (_, keys, _), _, _) = cache.state.history._records
    assert all(any(key is edge for edge in edges) for key in keys)


@pytest.mark.parametrize("history", [-1, 1.5, True])
def test_a_history_of_a_strange_length_is_refused(history: Any) -> None:  # noqa: ANN401
    with pytest.raises(LengthError, match="history must be an integer"):
        PrefixCache(PageAllocator(4, 4), history=history)


def test_what_is_no_token_cannot_be_explained() -> None:
    with pytest.raises(TokenError, match="-1 at position 1"):
        used().explain([1, -1])


def test_explaining_changes_nothing() -> None:
    cache = used()
    before, nodes = snapshot(cache), [(node.key, node.stamp) for node in cache.tree]
    cache.explain([1, 2, 3, 99])
    cache.explain([*range(1, 9), 9, 9], namespace="b")
    assert snapshot(cache) == before
    assert [(node.key, node.stamp) for node in cache.tree] == nodes
