"""What the allocator does, call by call, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from seqattn.counts import as_count
from seqattn.errors import BadValueError, InvariantError, LengthError, NoPageError, PageError
from seqattn.page_lists import concatenate
from seqattn.pages import PageAllocator


def state(pool: PageAllocator) -> tuple[object, ...]:
    return pool.ref_count.tolist(), pool.free_pages.tolist(), pool.available_pages_count, pool.num_outside_refs


# -- allocate and free -------------------------------------------------------------------------------------------------


def test_a_fresh_allocator_hands_out_pages_in_order() -> None:
    pool = PageAllocator(5, 4)
    assert pool.free_pages.tolist() == [0, 1, 2, 3, 4]
    assert [pool.allocate(n).tolist() for n in (2, 0, 3)] == [[0, 1], [], [2, 3, 4]]
    assert pool.available_pages_count == 0
    assert pool.ref_count.tolist() == [1] * 5


def test_the_state_of_the_picture() -> None:
    pool = PageAllocator(8, 16)
    pool.allocate(4)
    pool.ref([0])
    assert pool.free_pages[::-1].tolist() == [7, 6, 5, 4]
    assert pool.ref_count.tolist() == [2, 1, 1, 1, 0, 0, 0, 0]


def test_pages_come_as_int32() -> None:
    pool = PageAllocator(5, 4)
    given = (pool.allocate(2), pool.allocate(0), pool.take(1), pool.free_pages, pool.as_pages([]), concatenate([]))
    for pages in given:
        assert isinstance(pages, np.ndarray)
        assert pages.dtype == np.int32


def test_an_allocated_array_is_the_callers_own() -> None:
    pool = PageAllocator(4, 4)
    pages = pool.allocate(2)
    pages[:] = 3
    pool.check()
    assert pool.free_pages.tolist() == [2, 3]


def test_more_pages_than_are_free_are_refused() -> None:
    pool = PageAllocator(4, 4)
    pool.allocate(1)
    before = state(pool)
    for call in (pool.allocate, pool.take):
        with pytest.raises(NoPageError, match="4 pages needed, 3 available") as caught:
            call(4)
        assert (caught.value.needed, caught.value.available) == (4, 3)
    assert state(pool) == before


def test_the_free_pages_cannot_be_written() -> None:
    pool = PageAllocator(4, 4)
    with pytest.raises(ValueError, match="read-only"):
        pool.free_pages[0] = 3


def test_pages_are_freed_with_their_last_reference() -> None:
    pool = PageAllocator(4, 4)
    pages = pool.allocate(3)
    pool.ref(pages[:2])
    pool.unref(pages)
    assert sorted(pool.free_pages.tolist()) == [2, 3]
    pool.release_pages([0, 1])
    assert pool.available_pages_count == 4
    pool.check(np.empty(0, dtype=np.int32), exact=True)


def test_a_page_may_be_named_more_than_once_in_one_call() -> None:
    pool = PageAllocator(4, 4)
    pool.allocate(2)
    pool.ref([0, 0, 1])
    assert pool.ref_count.tolist() == [3, 2, 0, 0]
    pool.unref([0, 1, 0, 1, 0])
    assert sorted(pool.free_pages.tolist()) == [0, 1, 2, 3]
    pool.check()


def test_nothing_may_be_referenced_and_given_back() -> None:
    pool = PageAllocator(4, 4)
    for call in (pool.ref, pool.unref, pool.release_pages):
        call([])
        call(np.empty(0, dtype=np.int64))
    assert state(pool) == state(PageAllocator(4, 4))


def test_dropping_what_was_just_taken_restores_the_order() -> None:
    pool = PageAllocator(6, 4)
    pool.take(1)
    before = state(pool)
    assert pool.drop(pool.take(4)) == 4
    assert state(pool) == before


def test_held_pages_are_freed_by_the_last_drop() -> None:
    pool = PageAllocator(4, 4)
    pages = pool.take(2)
    pool.hold(pages)
    pool.hold(pages[:1])
    assert [pool.drop(pages), pool.drop(pages), pool.drop(pages[:1])] == [0, 1, 1]
    assert pool.drop(np.empty(0, dtype=np.int32)) == 0
    assert pool.available_pages_count == 4


def test_references_by_hand_are_counted() -> None:
    pool = PageAllocator(8, 4)
    pages = pool.allocate(3)
    pool.ref(pages)
    pool.unref(pages[:2])
    pool.hold(pool.take(2))
    assert pool.num_outside_refs == 4
    assert pool.release_refs([3]) == 1  # one that was not held by hand
    assert pool.num_outside_refs == 4


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (-1, 4), (4, 0), (4.0, 4), (4, "4"), (True, 4)])
def test_an_allocator_of_impossible_size_is_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(BadValueError, match="must be an integer of at least 1"):
        PageAllocator(num_pages, page_size)


@pytest.mark.parametrize("count", [-1, 1.0, None, True, "2"])
def test_a_count_must_be_a_whole_number(count: int) -> None:
    with pytest.raises(LengthError, match=f"num_pages must be an integer of at least 0, not {count!r}"):
        PageAllocator(4, 4).allocate(count)


def test_a_count_may_be_a_numpy_integer() -> None:
    counts: list[Any] = [np.int64(3), np.uint8(3), 3]
    assert [as_count("n", count) for count in counts] == [3, 3, 3]


BAD_PAGES: list[tuple[Any, str]] = [
    ([4], r"page 4 is not in \[0, 4\)"),
    ([0, -1], r"page -1 is not in \[0, 4\)"),
    ([2**40], rf"page {2**40} is not in"),
    ([2**80], "flat list of integers"),
    ([0.0], "flat list of integers"),
    ([True], "flat list of integers"),
    (["0"], "flat list of integers"),
    ([[0]], "flat list of integers"),
    ([[0], [0, 1]], "flat list of integers"),
    (0, "flat list of integers"),
    (None, "flat list of integers"),
    ({0}, "flat list of integers"),
    ([0, 1, 3], "page 3"),
]


@pytest.mark.parametrize("call", ["ref", "unref", "release_pages", "release_refs"])
@pytest.mark.parametrize(("pages", "message"), BAD_PAGES, ids=[repr(pages) for pages, _ in BAD_PAGES])
def test_what_is_no_page_in_use_is_refused_and_changes_nothing(call: str, pages: Any, message: str) -> None:  # noqa: ANN401  anything may be passed
    pool = PageAllocator(4, 4)
    pool.allocate(2)
    before = state(pool)
    with pytest.raises(PageError, match=message):
        getattr(pool, call)(pages)
    assert state(pool) == before


def test_a_page_given_back_more_often_than_it_is_held_is_refused() -> None:
    pool = PageAllocator(4, 4)
    pool.allocate(2)
    pool.ref([1])
    before = state(pool)
    with pytest.raises(PageError, match="page 1 has 2 references but 3 were given back"):
        pool.unref([1, 0, 1, 1])
    assert state(pool) == before


@pytest.mark.parametrize(
    ("src", "dst", "num_slots", "error", "message"),
    [
        ([0], [1], [0], LengthError, "0 slots cannot be copied: a page has 4"),
        ([0, 0], [1, 2], [4, 5], LengthError, "5 slots cannot be copied: a page has 4"),
        ([0], [1], [1.5], BadValueError, "1.5 slots"),
        ([0.5], [1], [1], PageError, "0.5 is not in use"),
        ([0], [1, 2], [1], LengthError, "1 source pages, 2 destinations and 1 slot counts differ"),
        ([0], [1], [1, 1], LengthError, "1 source pages, 1 destinations and 2 slot counts differ"),
        ([3], [1], [1], PageError, "page 3 is not in use"),
        ([0], [3], [1], PageError, "page 3 is not in use"),
        ([0], [9], [1], PageError, "page 9 is not in use"),
        ([0, 0], [1, 1], [1, 1], PageError, r"destinations \[1, 1\] must differ"),
        ([0, 1], [1, 2], [1, 1], PageError, r"destinations \[1, 2\] must differ .* sources \[0, 1\]"),
    ],
)
def test_a_copy_that_makes_no_sense_is_refused(
    src: list[int], dst: list[int], num_slots: list[int], error: type[Exception], message: str
) -> None:
    pool = PageAllocator(4, 4)
    pool.allocate(3)
    with pytest.raises(error, match=message):
        pool.copy_page_slots(src, dst, num_slots)


def test_a_copy_without_memory_does_nothing() -> None:
    pool = PageAllocator(4, 4)
    pool.allocate(3)
    before = state(pool)
    pool.copy_page_slots([0, 0], [1, 2], [1, 4])
    pool.copy_page_slots([], [], [])
    assert state(pool) == before


# -- check -------------------------------------------------------------------------------------------------------------


def broken(pool: PageAllocator, what: str) -> None:
    """Pages 0 to 3 of 6 are in use; something is wrong afterwards."""
    if what == "a page twice on the stack":
        pool._stack[:2] = 4
    elif what == "a page out of range on the stack":
        pool._stack[0] = 6
    elif what == "a free page with a reference":
        pool.ref_count[4] = 1
    elif what == "a page in use without a reference":
        pool.ref_count[0] = 0
    elif what == "a page that got lost":
        pool.available_pages_count -= 1
    else:
        pool.ref_count[1] = -1


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("a page twice on the stack", "P1"),
        ("a page out of range on the stack", "P1"),
        ("a free page with a reference", "P2"),
        ("a page in use without a reference", "P2"),
        ("a page that got lost", "P2"),
        ("a count below zero", "P2"),
    ],
)
def test_check_finds(what: str, name: str) -> None:
    pool = PageAllocator(6, 4)
    pool.allocate(4)
    pool.check()
    broken(pool, what)
    with pytest.raises(InvariantError) as caught:
        pool.check()
    assert caught.value.name == name


def test_check_compares_counts_with_the_known_holders() -> None:
    pool = PageAllocator(4, 4)
    held = pool.allocate(2)
    pool.ref([0])
    pool.check(held)
    pool.check(np.array([0, 1, 0], dtype=np.int32), exact=True)
    with pytest.raises(InvariantError, match="P3: page 0 has ref_count 2 but 1 holders"):
        pool.check(held, exact=True)
    with pytest.raises(InvariantError, match="P3: page 1 has ref_count 1 but 2 holders"):
        pool.check(np.array([0, 1, 1], dtype=np.int32))


def test_check_finds_a_holder_of_a_page_that_does_not_exist() -> None:
    pool = PageAllocator(4, 4)
    pool.allocate(2)
    with pytest.raises(InvariantError, match="P3"):
        pool.check(np.array([0, 1, 4], dtype=np.int32))
