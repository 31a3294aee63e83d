"""Conversations: what they hold of the cache, and for how long."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading

import pytest

from radix.cache import PrefixCache
from radix.session_store import Sessions
from radix.tokens import as_key
from seqattn import PageAllocator
from seqattn.errors import BadValueError, InvariantError, LengthError, NoPageError, SessionError, TokenError
from tests.radix.conversation import Clock, serve
from tests.radix.state import eviction_order, snapshot


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(PageAllocator(32, 4))


@pytest.fixture
def sessions(cache: PrefixCache, clock: Clock) -> Sessions:
    return Sessions(cache, clock=clock, time_to_live=10)


def test_bad_times_and_namespaces_are_refused_at_once(cache: PrefixCache, sessions: Sessions) -> None:
    for value in (-1, float("nan"), "5", None):
        with pytest.raises(BadValueError, match="time_to_live must be a number of at least 0"):
            Sessions(cache, clock=Clock(), time_to_live=value)  # type: ignore[arg-type]
    with pytest.raises(BadValueError, match=r"namespace must be hashable, not \[\]"):
        sessions.open("ann", namespace=[])  # type: ignore[arg-type]
    assert len(sessions) == 0


def test_a_clock_that_fails_closes_nothing_and_one_that_was_set_back_lets_nobody_overtake(cache: PrefixCache) -> None:
    times = iter([10.0, 10.0, 3.0, 3.0, 3.0, 3.0])
    sessions = Sessions(cache, clock=lambda: next(times), time_to_live=5)
    ann, ben, cem = map(sessions.open, ("ann", "ben", "cem"))
    ann.close()
    ben.close()
    sessions.check()
    with pytest.raises(StopIteration):
        cem.close()
    assert cem.is_open
    sessions.check()


# -- a conversation ----------------------------------------------------------------------------------------------------


def test_each_turn_computes_the_new_tokens_and_the_last_of_the_answer(cache: PrefixCache, sessions: Sessions) -> None:
    session = sessions.open("ann")
    session.append(range(10))
    assert serve(cache, session, [20, 21, 22, 23, 24, 25, 26]) == 0
    assert (session.num_tokens, session.num_pinned_tokens, session.lengths) == (17, 16, [10, 17])
    session.append([30, 31, 32])
    assert serve(cache, session, [40, 41]) == 16
    assert session.tokens.tolist() == [*range(10), *range(20, 27), 30, 31, 32, 40, 41]
    sessions.check()
    cache.check()


def test_what_an_open_session_holds_is_not_evicted(cache: PrefixCache, sessions: Sessions) -> None:
    session = sessions.open("ann")
    session.append(range(10))
    serve(cache, session, [20, 21])
    assert cache.evict(99) == 0
    session.close()
    assert cache.evict(99) == 0


def test_a_closed_session_is_kept_for_its_time_and_then_let_go(
    cache: PrefixCache, sessions: Sessions, clock: Clock
) -> None:
    session = sessions.open("ann")
    session.append(range(10))
    serve(cache, session, [20, 21])
    session.close()
    clock.now = 9.9
    assert (sessions.expire(), len(sessions), cache.num_reclaimable_pages) == (0, 1, 0)
    clock.now = 10
    assert (sessions.expire(), len(sessions), cache.num_reclaimable_pages) == (1, 0, 3)
    assert sessions.open("ann").num_tokens == 0, "it is forgotten: this is another one"


def test_a_session_that_is_opened_again_in_time_goes_on(cache: PrefixCache, sessions: Sessions, clock: Clock) -> None:
    session = sessions.open("ann")
    session.append(range(10))
    serve(cache, session, [20, 21])
    session.close()
    clock.now = 9
    assert sessions.open("ann") is session
    clock.now = 30
    session.append([30])
    assert session.num_pinned_tokens == 11


def test_without_a_time_to_live_closing_lets_go_at_once(cache: PrefixCache, clock: Clock) -> None:
    sessions = Sessions(cache, clock=clock, time_to_live=0)
    with sessions.open("ann") as session:
        session.append(range(10))
        serve(cache, session, [20, 21])
    assert (len(sessions), cache.num_reclaimable_pages) == (0, 3)


def test_any_call_lets_go_of_what_has_expired(cache: PrefixCache, sessions: Sessions, clock: Clock) -> None:
    ann, ben = sessions.open("ann"), sessions.open("ben")
    ben.append(range(10))
    serve(cache, ben, [20])
    ben.close()
    clock.now = 99
    assert len(sessions) == 2
    ann.append([1])
    assert (len(sessions), cache.num_reclaimable_pages) == (1, 3)


def test_when_pages_are_short_the_session_closed_first_can_be_ended_early(
    cache: PrefixCache, sessions: Sessions, clock: Clock
) -> None:
    for name in ("ann", "ben"):
        session = sessions.open(name)
        session.append([ord(name[0])] * 8)
        serve(cache, session, [1])
        session.close()
        clock.now += 1
    assert sessions.expire_next()
    assert (len(sessions), cache.num_reclaimable_pages) == (1, 2)
    assert cache.match([ord("a")] * 8).num_tokens == 8, "unpinned, not evicted"
    assert sessions.expire_next()
    assert not sessions.expire_next()


def test_sessions_of_two_namespaces_share_nothing(cache: PrefixCache, sessions: Sessions) -> None:
    ann, ben = sessions.open("ann", namespace="a"), sessions.open("ben", namespace="b")
    for session in (ann, ben):
        session.append(range(10))
    assert (serve(cache, ann, [1]), serve(cache, ben, [1])) == (0, 0)


# -- branches ----------------------------------------------------------------------------------------------------------


def test_a_fork_shares_all_pages_and_only_the_one_where_they_part_is_copied(
    cache: PrefixCache, sessions: Sessions
) -> None:
    session = sessions.open("ann")
    session.append(range(18))
    serve(cache, session, [20])
    twin = session.fork("ann, again")
    assert twin.tokens.tolist() == session.tokens.tolist()
    session.append([98])
    assert serve(cache, session, [7]) == 18
    num_free, num_forked = cache.manager.available_pages_count, cache.stats.num_forked_pages
    twin.append([99])
    assert serve(cache, twin, [7]) == 19
    assert cache.manager.available_pages_count == num_free - 1
    assert cache.stats.num_forked_pages == num_forked + 1


def test_what_is_rolled_back_is_evicted_first(cache: PrefixCache, sessions: Sessions) -> None:
    older = sessions.open("older")
    older.append([50] * 8)
    serve(cache, older, [1])
    older.discard()
    session = sessions.open("ann")
    session.append(range(8))
    serve(cache, session, [20] * 12)
    session.rollback(10)
    assert session.lengths == [8]
    assert session.tokens.tolist() == [*range(8), 20, 20]
    assert (session.num_pinned_tokens, cache.num_reclaimable_pages) == (10, 4)
    cache.evict(2)
    assert cache.match([*range(8), *[20] * 12]).num_tokens == 12
    assert cache.match([50] * 8).num_tokens == 8, "older, but nobody has taken it back"


def test_the_page_where_a_rollback_ends_is_kept_until_it_has_been_copied(
    cache: PrefixCache, sessions: Sessions
) -> None:
    session = sessions.open("ann")
    session.append(range(8))
    serve(cache, session, [20, 21, 22, 23])
    page = cache.match([*range(8), 20, 21]).tail_page
    session.rollback(10)
    session.append([30, 31])
    assert serve(cache, session, [40]) == 10, "exact to the token"
    assert eviction_order(cache.tree) == [page]


def test_a_branch_that_lost_goes_first_and_what_it_shared_stays(cache: PrefixCache, sessions: Sessions) -> None:
    session = sessions.open("ann")
    session.append(range(9))
    serve(cache, session, [1])
    branches = [session.fork(name) for name in ("one", "two", "three")]
    for number, branch in enumerate(branches):
        branch.append([60 + number] * 3)
        serve(cache, branch, [70 + number] * 4)
    for branch in branches[:2]:
        branch.discard()
    # Of the first one's two pages one stays: it took the place of the partly filled page that the session has pinned.
    assert (len(sessions), cache.num_reclaimable_pages) == (2, 3)
    cache.evict(3)
    assert cache.match(branches[2].tokens).num_tokens == branches[2].num_tokens - 1
    assert cache.match(session.tokens).num_tokens == session.num_tokens
    cache.check()


def test_conversations_of_many_threads_leave_the_cache_sound(cache: PrefixCache) -> None:
    ticks, failed = itertools.count(), list[BaseException]()
    sessions = Sessions(cache, clock=lambda: next(ticks), time_to_live=30)

    def live(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for turn in range(150):
                with sessions.open((seed, turn // 5)) as session:
                    session.append(rng.choices(range(2), k=rng.randint(1, 6)))
                    with contextlib.suppress(NoPageError):
                        serve(cache, session, rng.choices(range(2), k=4))
                    session.rollback(min(session.num_tokens, rng.randint(0, 20)))
                    if rng.random() < 0.3:
                        session.fork((seed, turn, "fork")).discard()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=live, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    sessions.check()
    cache.check()
    while sessions.expire_next():
        pass
    cache.evict(32)
    assert (len(sessions), cache.manager.available_pages_count) == (0, 32)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_closed_session_refuses_everything(sessions: Sessions) -> None:
    session = sessions.open("ann")
    session.append([1, 2, 3])
    session.close()
    calls = [
        lambda: session.append([1]),
        lambda: session.update([1, 2]),
        lambda: session.rollback(1),
        lambda: session.fork("ben"),
        session.close,
        session.discard,
    ]
    for call in calls:
        with pytest.raises(SessionError, match="'ann' is closed: open it again"):
            call()
    assert (session.num_tokens, len(sessions)) == (3, 1)


def test_bad_values_are_refused_and_change_nothing(cache: PrefixCache, sessions: Sessions) -> None:
    session = sessions.open("ann")
    session.append(range(9))
    serve(cache, session, [1, 2])
    sessions.open("ben", namespace="b")
    before = snapshot(cache), repr(session), session.lengths[:]
    with pytest.raises(TokenError):
        session.append([-1])
    with pytest.raises(TokenError):
        session.update("text")
    with pytest.raises(LengthError, match="num_tokens must be an integer of at least 0, not -1"):
        session.rollback(-1)
    with pytest.raises(BadValueError, match="'ann' holds 11 tokens: it cannot keep 12"):
        session.rollback(12)
    with pytest.raises(SessionError, match="'ben' exists"):
        session.fork("ben")
    with pytest.raises(SessionError, match="'ben' is in namespace 'b', not in None"):
        sessions.open("ben")
    with pytest.raises(BadValueError, match="session_id must be hashable"):
        sessions.open([])  # type: ignore[arg-type]
    with pytest.raises(BadValueError, match="session_id must be hashable"):
        session.fork([])  # type: ignore[arg-type]
    assert (snapshot(cache), repr(session), session.lengths) == before


@pytest.mark.parametrize("time_to_live", [-1, float("nan")])
def test_a_time_to_live_must_be_a_time(cache: PrefixCache, clock: Clock, time_to_live: float) -> None:
    with pytest.raises(BadValueError, match="time_to_live must be a number of at least 0"):
        Sessions(cache, clock=clock, time_to_live=time_to_live)


def test_a_session_that_its_block_has_closed_or_discarded_is_not_closed_twice(sessions: Sessions) -> None:
    with sessions.open("ann") as session:
        session.discard()
    assert not session.is_open
    assert "ann" in repr(session)


def test_check_finds_a_pin_of_other_tokens_and_an_unknown_session(cache: PrefixCache, sessions: Sessions) -> None:
    session = sessions.open("ann")
    session.append(range(9))
    serve(cache, session, [1, 2])
    sessions.check()
    session._key = as_key([5] * 11)
    with pytest.raises(InvariantError, match="L2"):
        sessions.check()
    session.is_open = False
    with pytest.raises(InvariantError, match="L1"):
        sessions.check()


def test_what_a_clear_forgets_is_held_no_longer(cache: PrefixCache, sessions: Sessions) -> None:
    session = sessions.open("ann")
    session.append(range(9))
    serve(cache, session, [1, 2])
    cache.clear()
    sessions.check()
    session.append([3])
    assert (session.num_tokens, session.num_pinned_tokens) == (12, 0)
    assert cache.manager.available_pages_count == 32
