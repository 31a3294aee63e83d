"""What a descriptor does, call by call, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from seqattn.descriptor import CacheDescriptor, SequenceData
from seqattn.errors import (
    BadValueError,
    DuplicateSequenceError,
    InvariantError,
    LengthError,
    NoPageError,
    PageError,
    SequenceIdError,
    UnknownSequenceError,
)
from seqattn.pages import PageAllocator
from tests.radix.fake_kv import FakeKV


def desk(num_pages: int = 8, page_size: int = 4) -> CacheDescriptor:
    return CacheDescriptor(FakeKV(num_pages, page_size))


def tables(descriptor: CacheDescriptor) -> dict[Any, list[int]]:
    return {seq_id: data.kv_page_indices for seq_id, data in descriptor.seq_id_to_data.items()}


def state(descriptor: CacheDescriptor) -> tuple[object, ...]:
    manager = descriptor.cache_manager
    lens = {seq_id: descriptor.num_tokens(seq_id) for seq_id in descriptor.seq_id_to_data}
    return tables(descriptor), lens, manager.ref_count.tolist(), manager.free_pages.tolist(), manager.num_outside_refs


# -- growing ----------------------------------------------------------------------------------------------------------


def test_the_example_at_the_top_of_the_module_is_true() -> None:
    d = desk()
    d.allocate([1], [10])
    assert d.seq_id_to_data == {1: SequenceData([0, 1, 2], 2)}
    d.fork(1, 2)
    assert d.seq_id_to_data[2] == SequenceData([0, 1, 3], 2)
    d.truncate(2, 6)
    assert d.seq_id_to_data[2] == SequenceData([0, 1], 2)
    d.extend(2, 1)
    assert d.seq_id_to_data[2] == SequenceData([0, 3], 3)
    assert d.seq_id_to_data[1] == SequenceData([0, 1, 2], 2)


def test_allocate_starts_unknown_ids_and_appends_to_known_ones() -> None:
    d = desk()
    d.allocate([1, 2], [4, 5])
    assert tables(d) == {1: [0], 2: [1, 2]}
    d.allocate([2, 3], [3, 1])
    assert tables(d) == {1: [0], 2: [1, 2], 3: [3]}
    assert [d.num_tokens(seq_id) for seq_id in (1, 2, 3)] == [4, 8, 1]


def test_decoding_takes_a_page_only_where_the_last_one_is_full() -> None:
    d = desk()
    d.allocate([1, 2], [4, 3])
    d.allocate_decoding([1, 2])
    assert tables(d) == {1: [0, 2], 2: [1]}
    assert [d.num_tokens(1), d.num_tokens(2)] == [5, 4]


def test_growing_nothing_is_legal() -> None:
    d = desk()
    d.allocate([], [])
    d.allocate_decoding([])
    d.release([])
    assert tables(d) == {}


def test_decoding_without_pages_changes_no_length() -> None:
    d = desk(num_pages=2)
    d.allocate([1, 2], [3, 4])
    before = state(d)
    with pytest.raises(NoPageError) as error:
        d.allocate_decoding([1, 2])
    assert (error.value.needed, error.value.available) == (1, 0)
    assert state(d) == before


def test_pages_of_released_sequences_are_handed_out_again() -> None:
    d = desk(num_pages=2)
    d.allocate([1, 2], [1, 1])
    d.release([1])
    d.allocate([3], [2])
    assert tables(d) == {2: [1], 3: [0]}


def test_ids_may_be_any_hashable_value() -> None:
    d = desk()
    d.allocate(["chat", (1, 2), None], [1, 1, 1])
    d.fork("chat", ("chat", "copy"))
    d.release([None, (1, 2), "chat", ("chat", "copy")])
    assert d.cache_manager.available_pages_count == 8


def test_kv_page_indices_is_a_list_of_its_own() -> None:
    d = desk()
    d.allocate([1], [5])
    d.seq_id_to_data[1].kv_page_indices.append(7)
    assert d.seq_id_to_data[1].kv_page_indices == [0, 1]
    assert d.seq_id_to_data[1].pages.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        d.seq_id_to_data[1].pages[0] = 3


# -- sharing and cutting ----------------------------------------------------------------------------------------------


def test_a_fork_of_full_pages_takes_no_page_at_all() -> None:
    d = desk(num_pages=2)
    d.allocate([1], [8])
    d.fork(1, 2)
    assert tables(d) == {1: [0, 1], 2: [0, 1]}
    assert d.cache_manager.ref_count.tolist() == [2, 2]


def test_a_fork_of_an_empty_sequence_is_empty() -> None:
    d = desk()
    d.attach(1, [], 0)
    d.fork(1, 2)
    d.extend(2, 1)
    assert tables(d) == {1: [], 2: [0]}


def test_a_cut_inside_a_shared_page_keeps_sharing_it_until_it_grows() -> None:
    d = desk(num_pages=3)
    d.allocate([1], [8])
    d.fork(1, 2)
    d.truncate(2, 7)
    assert tables(d) == {1: [0, 1], 2: [0, 1]}
    d.extend(2, 1)
    assert tables(d) == {1: [0, 1], 2: [0, 2]}


def test_a_cut_page_held_alone_is_written_in_place() -> None:
    d = desk()
    d.allocate([1], [8])
    d.truncate(1, 7)
    d.extend(1, 1)
    assert tables(d) == {1: [0, 1]}


def test_growth_that_cannot_copy_the_cut_page_changes_nothing() -> None:
    d = desk(num_pages=2)
    d.allocate([1], [8])
    d.fork(1, 2)
    d.truncate(2, 7)
    before = state(d)
    with pytest.raises(NoPageError) as error:
        d.extend(2, 1)
    assert (error.value.needed, error.value.available) == (1, 0)
    assert state(d) == before


def test_a_cut_to_a_page_boundary_frees_the_pages_past_it() -> None:
    d = desk()
    d.allocate([1], [10])
    d.truncate(1, 4)
    assert tables(d) == {1: [0]}
    assert d.seq_id_to_data[1].last_page_len == 4
    d.truncate(1, 0)
    assert tables(d) == {1: []}
    assert d.seq_id_to_data[1].last_page_len == 0
    assert d.cache_manager.available_pages_count == 8


def test_attach_takes_over_the_references_of_the_caller() -> None:
    d = desk()
    pages = d.cache_manager.allocate(2)
    d.attach(1, pages, 6)
    assert d.num_tokens(1) == 6
    assert d.cache_manager.num_outside_refs == 0
    d.cache_manager.check(d.held_pages(), exact=True)
    d.release([1])
    assert d.cache_manager.available_pages_count == 8


def test_the_copy_of_a_cut_page_moves_the_tokens_before_the_cut() -> None:
    memory = FakeKV(3, 4)
    d = CacheDescriptor(memory)
    d.allocate([1], [4])
    memory.compute([0], None, [5, 6, 7, 8], 0, 4)
    d.fork(1, 2)
    d.truncate(2, 2)
    d.extend(2, 1)
    assert memory.slots[1] == [(None, (5,)), (None, (5, 6)), None, None]


def test_several_cut_pages_are_copied_in_one_operation() -> None:
    memory = FakeKV(8, 4)
    d = CacheDescriptor(memory)
    d.allocate([1, 2], [4, 4])
    d.fork(1, 3)
    d.fork(2, 4)
    d.truncate(3, 1)
    d.truncate(4, 2)
    d.allocate_decoding([3, 4])
    assert memory.num_copies == 1
    assert tables(d) == {1: [0], 2: [1], 3: [2], 4: [3]}


# -- what is refused --------------------------------------------------------------------------------------------------

Call = Callable[[CacheDescriptor], Any]

REFUSED: list[tuple[str, Call, type[Exception], str]] = [
    ("lists of two lengths", lambda d: d.allocate([3, 4], [1]), LengthError, "2 sequence ids but 1"),
    ("a length of zero", lambda d: d.allocate([3], [0]), LengthError, "not 0"),
    ("a length below zero", lambda d: d.allocate([1], [-2]), LengthError, "not -2"),
    ("a length that is no integer", lambda d: d.allocate([3], [1.5]), LengthError, "1.5"),  # type: ignore[list-item]
    ("a length that is a bool", lambda d: d.allocate([3], [True]), LengthError, "True"),
    ("an id twice", lambda d: d.allocate([3, 3], [1, 1]), DuplicateSequenceError, "3"),
    ("a good length before a bad one", lambda d: d.allocate([3, 4], [1, 0]), LengthError, "not 0"),
    ("decoding an unknown id", lambda d: d.allocate_decoding([1, 9]), UnknownSequenceError, "9"),
    ("decoding an id twice", lambda d: d.allocate_decoding([1, 1]), DuplicateSequenceError, "1"),
    ("extending an unknown id", lambda d: d.extend(9, 1), UnknownSequenceError, "9"),
    ("extending by nothing", lambda d: d.extend(1, 0), LengthError, "not 0"),
    ("forking an unknown id", lambda d: d.fork(9, 3), UnknownSequenceError, "9"),
    ("forking onto a running id", lambda d: d.fork(1, 2), DuplicateSequenceError, "2"),
    ("forking onto itself", lambda d: d.fork(1, 1), DuplicateSequenceError, "1"),
    ("cutting an unknown id", lambda d: d.truncate(9, 0), UnknownSequenceError, "9"),
    ("cutting to more than there is", lambda d: d.truncate(1, 11), LengthError, "10 tokens .* 11"),
    ("cutting below zero", lambda d: d.truncate(1, -1), LengthError, "-1"),
    ("releasing an unknown id", lambda d: d.release([1, 9]), UnknownSequenceError, "9"),
    ("releasing an id twice", lambda d: d.release([1, 1]), DuplicateSequenceError, "1"),
    ("packing an unknown id", lambda d: d.pack_for_flashinfer([9]), UnknownSequenceError, "9"),
    ("packing more than there is", lambda d: d.pack_for_flashinfer([1], num_tokens=[11]), LengthError, "11"),
    ("packing with too few lengths", lambda d: d.pack_for_flashinfer([1, 2], num_tokens=[1]), LengthError, "1 length"),
    ("attaching to a running id", lambda d: d.attach(1, [0], 1), DuplicateSequenceError, "1"),
    ("attaching too few pages", lambda d: d.attach(3, [0], 5), LengthError, "5 tokens take 2 pages"),
    ("attaching too many pages", lambda d: d.attach(3, [0, 1], 4), LengthError, "4 tokens take 1 page"),
    ("attaching pages but no token", lambda d: d.attach(3, [0], 0), LengthError, "0 tokens"),
    ("attaching a page twice", lambda d: d.attach(3, [0, 0], 8), PageError, "twice"),
    ("attaching a free page", lambda d: d.attach(3, [7], 1), PageError, "7 is free"),
    ("attaching a page out of range", lambda d: d.attach(3, [8], 1), PageError, "8"),
    ("attaching fewer than no tokens", lambda d: d.attach(3, [], -1), LengthError, "-1"),
    ("an id that cannot be hashed", lambda d: d.allocate([[1]], [1]), BadValueError, "hashable"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("call", "kind", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_is_refused_shows_the_value_and_changes_nothing(call: Call, kind: type[Exception], message: str) -> None:
    d = desk()
    d.allocate([1, 2], [10, 4])
    before = state(d)
    with pytest.raises(kind, match=message):
        call(d)
    assert state(d) == before
    d.check()


def test_an_unknown_id_is_a_key_error_and_a_value_error_as_in_0_0_2() -> None:
    for kind in (KeyError, ValueError, SequenceIdError):
        with pytest.raises(kind):
            desk().pack_for_flashinfer([1])


def test_sequence_data_refuses_a_length_that_does_not_fit_its_pages() -> None:
    for pages, last in (([], 1), ([3], 0), ([3], -1)):
        with pytest.raises(LengthError, match="does not fit"):
            SequenceData(pages, last)


# -- packing ----------------------------------------------------------------------------------------------------------


def test_packing_puts_the_page_tables_one_after_another() -> None:
    d = desk()
    d.allocate([1, 2], [10, 4])
    packed = d.pack_for_flashinfer([2, 1])
    assert packed.kv_page_indices.tolist() == [3, 0, 1, 2]
    assert packed.kv_page_indptr.tolist() == [0, 1, 4]
    assert packed.kv_last_page_len.tolist() == [4, 2]


def test_packing_part_of_a_sequence_stops_at_the_page_of_its_last_token() -> None:
    d = desk()
    d.allocate([1, 2], [10, 4])
    packed = d.pack_for_flashinfer([1, 2], num_tokens=[8, 0])
    assert packed.kv_page_indices.tolist() == [0, 1]
    assert packed.kv_page_indptr.tolist() == [0, 2, 2]
    assert packed.kv_last_page_len.tolist() == [4, 0]


def test_a_pack_is_renewed_when_a_table_changes_and_not_before() -> None:
    d = desk()
    d.allocate([1], [1])
    first = d.pack_for_flashinfer([1])
    d.extend(1, 1)
    second = d.pack_for_flashinfer([1])
    assert second.kv_page_indices is first.kv_page_indices
    assert (first.kv_last_page_len.tolist(), second.kv_last_page_len.tolist()) == ([1], [2])
    d.extend(1, 3)
    assert d.pack_for_flashinfer([1]).kv_page_indices.tolist() == [0, 1]


Step = Callable[[CacheDescriptor], Any]

CHANGES: dict[str, list[Step]] = {
    "growth": [lambda d: d.extend(1, 8)],
    "a copied page": [lambda d: d.truncate(1, 7), lambda d: d.extend(1, 1)],
    "a cut": [lambda d: d.truncate(1, 1)],
    "a new start": [lambda d: d.release([1]), lambda d: d.allocate([3], [1]), lambda d: d.allocate([1], [8])],
    "attach": [lambda d: d.release([1]), lambda d: d.attach(1, d.cache_manager.allocate(2), 8)],
    "fork": [lambda d: d.release([1]), lambda d: d.truncate(2, 4), lambda d: d.fork(2, 1)],
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_no_change_of_a_table_leaves_an_old_pack_in_use(change: str) -> None:
    d = desk()
    d.allocate([1], [8])
    d.fork(1, 2)
    d.pack_for_flashinfer([1])
    for step in CHANGES[change]:
        step(d)
    assert d.pack_for_flashinfer([1]).kv_page_indices.tolist() == d.seq_id_to_data[1].kv_page_indices


# -- a failure in the middle ------------------------------------------------------------------------------------------


class Broken(PageAllocator):
    """Fails at every copy, after the pages for it were taken."""

    def copy_page_slots(self, src_pages: object, dst_pages: object, num_slots: object) -> None:
        raise RuntimeError("the copy failed")


@pytest.mark.parametrize(
    "call", [lambda d: d.extend(2, 9), lambda d: d.fork(2, 3), lambda d: d.allocate([3, 2], [5, 1])]
)
def test_a_copy_that_fails_leaves_everything_as_it_was(call: Call) -> None:
    d = CacheDescriptor(Broken(8, 4))
    d.allocate([1], [8])
    d.fork(1, 2)
    d.truncate(2, 7)
    before = state(d)
    with pytest.raises(RuntimeError, match="the copy failed"):
        call(d)
    assert state(d) == before
    d.check()


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_names_the_invariant_that_does_not_hold() -> None:
    for spoil, name in (
        (lambda d: d.seq_id_to_data[1].table.__setitem__(1, 0), "S1"),
        (lambda d: setattr(d.seq_id_to_data[1], "last_page_len", 5), "S2"),
        (lambda d: setattr(d.seq_id_to_data[1], "last_page_len", 0), "S2"),
        (lambda d: d.cache_manager.drop(np.array([0], dtype=np.int32)), "P3"),
        (lambda d: d.cache_manager.ref_count.__setitem__(0, 0), "P2"),
    ):
        d = desk()
        d.allocate([1], [6])
        d.check()
        spoil(d)
        with pytest.raises(InvariantError) as error:
            d.check()
        assert error.value.name == name
