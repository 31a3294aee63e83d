"""Packed data: what the constructors refuse, what check() finds, and that unpacking gives back what was packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attrs.exceptions import FrozenInstanceError
from hypothesis import given

from seqattn.errors import InvariantError, LengthError, TensorError
from seqattn.packed import FlashInferHybridData, FlashInferPackedData, HybridLevel
from tests.seqattn.truth import Batch, batches, int32, pack

PLAIN = {"kv_page_indices": [0, 1, 2, 5, 9], "kv_page_indptr": [0, 4, 5], "kv_last_page_len": [10, 5]}


def plain(**changes: list[int]) -> dict[str, torch.Tensor]:
    return {name: int32(*values) for name, values in {**PLAIN, **changes}.items()}


def level(qo: list[int], indptr: list[int], pages: list[int], last: list[int]) -> HybridLevel:
    return HybridLevel(int32(*qo), int32(*indptr), int32(*pages), int32(*last))


def picture() -> list[HybridLevel]:
    """The levels drawn in seqattn/packed.py."""
    return [
        level([0, 3, 4], [0, 3, 3], [0, 1, 2], [16, 0]),
        level([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 6, 7, 9], [10, 4, 16, 5]),
    ]


# -- plain -------------------------------------------------------------------------------------------------------------


def test_the_sequences_of_the_picture() -> None:
    packed = FlashInferPackedData(**plain())
    assert packed.num_sequences == 2
    assert packed.num_tokens(16).tolist() == [58, 5]
    assert [(pages.tolist(), last) for pages, last in packed.unpack()] == [([0, 1, 2, 5], 10), ([9], 5)]
    packed.check(16)


@given(batches())
def test_unpacking_gives_back_what_was_packed(batch: Batch) -> None:
    packed = pack(batch)
    packed.check(batch.page_size)
    pages, last = zip(*packed.unpack(), strict=True)
    assert [table.tolist() for table in pages] == [table.tolist() for table in batch.tables]
    assert packed.num_tokens(batch.page_size).tolist() == batch.num_tokens
    assert list(last) == [(n - 1) % batch.page_size + 1 for n in batch.num_tokens]


def test_an_empty_batch_packs_and_unpacks() -> None:
    packed = FlashInferPackedData(int32(), int32(0), int32())
    packed.check(16)
    assert (packed.num_sequences, packed.unpack(), packed.num_tokens(16).tolist()) == (0, [], [])


def test_a_sequence_without_pages_has_no_tokens() -> None:
    packed = FlashInferPackedData(int32(3), int32(0, 0, 1), int32(0, 2))
    assert packed.num_tokens(4).tolist() == [0, 2]
    assert [pages.tolist() for pages, _ in packed.unpack()] == [[], [3]]


BROKEN: list[tuple[str, dict[str, list[int]], str]] = [
    ("B1", {"kv_page_indptr": [0, 4]}, "kv_page_indptr has 2 offsets for 2 entries"),
    ("B1", {"kv_page_indptr": []}, "kv_page_indptr has 0 offsets for 2 entries"),
    ("B1", {"kv_page_indptr": [1, 4, 5]}, r"start at 0 and never decrease, not \[1, 4, 5\]"),
    ("B1", {"kv_page_indptr": [0, 6, 5]}, r"start at 0 and never decrease, not \[0, 6, 5\]"),
    ("B1", {"kv_page_indptr": [0, 4, 4], "kv_last_page_len": [10, 0]}, "ends at 4 but there are 5 page numbers"),
    ("B1", {"kv_page_indices": [0, 1, -7, 5, 9]}, "kv_page_indices holds -7"),
    ("B2", {"kv_last_page_len": [0, 5]}, r"kv_last_page_len\[0\] is 0 for 4 pages: it must be in \[1"),
    ("B2", {"kv_last_page_len": [10, -5]}, r"kv_last_page_len\[1\] is -5"),
    ("B2", {"kv_page_indptr": [0, 5, 5]}, r"kv_last_page_len\[1\] is 5 for 0 pages: it must be 0"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BROKEN)
def test_broken_offsets_are_refused_when_built_and_found_by_check(
    name: str, changes: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(LengthError, match=message):
        FlashInferPackedData(**plain(**changes))
    with pytest.raises(InvariantError, match=message) as caught:
        FlashInferPackedData.trusted(**plain(**changes)).check()
    assert caught.value.name == name


def test_a_last_page_longer_than_a_page_is_found_where_the_page_size_is_known() -> None:
    packed = FlashInferPackedData(**plain(kv_last_page_len=[17, 5]))
    packed.check()
    with pytest.raises(InvariantError, match=r"B2: kv_last_page_len\[0\] is 17 .* in \[1, 16\]"):
        packed.check(16)


NOT_VECTORS: list[Any] = [[0, 1], None, np.array([0, 1]), torch.tensor([0, 1]), torch.tensor(0, dtype=torch.int32)]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("wrong", NOT_VECTORS, ids=repr)
def test_only_int32_vectors_are_accepted(name: str, wrong: Any) -> None:  # noqa: ANN401  anything may be passed
    with pytest.raises(TensorError, match=f"{name} must be an int32 tensor with one axis"):
        FlashInferPackedData(**{**plain(), name: wrong})


def test_trusted_data_is_not_looked_at() -> None:
    packed = FlashInferPackedData.trusted(*plain(kv_page_indptr=[7]).values())
    assert packed.kv_page_indptr.tolist() == [7]


def test_packed_data_cannot_be_changed_by_assignment() -> None:
    with pytest.raises(FrozenInstanceError):
        FlashInferPackedData(**plain()).kv_page_indptr = int32(0)  # type: ignore[misc]  # what is tested


def test_to_device_moves_every_tensor() -> None:
    packed = FlashInferPackedData(**plain())
    moved = packed.to_device("meta")
    for tensor in (moved.kv_page_indices, moved.kv_page_indptr, moved.kv_last_page_len):
        assert tensor.device.type == "meta"
    here = packed.to_device(torch.device("cpu"), False)
    assert here.kv_page_indices is packed.kv_page_indices


# -- hybrid ------------------------------------------------------------------------------------------------------------


def test_the_levels_of_the_picture() -> None:
    data = FlashInferHybridData(tuple(picture()), torch.tensor([0, 1, 2, 3]))
    data.check(16)
    assert (data.num_sequences, data.num_rows, data.levels[0].num_groups) == (4, 4, 2)
    assert [pages.tolist() for pages in data.unpack()] == [[0, 1, 2, 5], [0, 1, 2, 6], [0, 1, 2, 7], [9]]


def test_unpacking_gives_tables_in_the_callers_order() -> None:
    data = FlashInferHybridData(tuple(picture()), torch.tensor([2, 0, 3, 1]))
    assert [pages.tolist() for pages in data.unpack()] == [[0, 1, 2, 6], [9], [0, 1, 2, 5], [0, 1, 2, 7]]


def test_levels_may_come_as_a_list_and_end_up_as_a_tuple() -> None:
    data = FlashInferHybridData(picture(), torch.tensor([0, 1, 2, 3]))  # type: ignore[arg-type]  # what is tested
    assert isinstance(data.levels, tuple)


def test_to_device_moves_the_levels_but_not_the_order() -> None:
    moved = FlashInferHybridData(tuple(picture()), torch.arange(4)).to_device("meta")
    for moved_level in moved.levels:
        assert moved_level.qo_indptr.device.type == moved_level.kv_page_indices.device.type == "meta"
        assert moved_level.kv_page_indptr.device.type == moved_level.kv_last_page_len.device.type == "meta"
    assert moved.order.device.type == "cpu"


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [0, 1, 2, 3, 4]])
def test_an_order_must_name_each_sequence_once(order: list[int]) -> None:
    with pytest.raises(LengthError, match="does not name each of the 4 sequences once"):
        FlashInferHybridData(tuple(picture()), torch.tensor(order))


def test_an_order_must_be_int64_on_the_cpu_and_levels_must_be_levels() -> None:
    for order in (int32(0, 1, 2, 3), [0, 1, 2, 3], torch.arange(4, device="meta")):
        with pytest.raises(TensorError, match="order must be an int64 tensor on the CPU"):
            FlashInferHybridData(tuple(picture()), order)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(TensorError, match="levels must be one HybridLevel or more"):
        FlashInferHybridData((), torch.arange(0))


def test_a_level_refuses_what_breaks_its_offsets() -> None:
    with pytest.raises(LengthError, match="qo_indptr has 2 offsets for 2 entries"):
        level([0, 4], [0, 3, 3], [0, 1, 2], [16, 0])
    with pytest.raises(LengthError, match=r"kv_last_page_len\[1\] is 16 for 0 pages"):
        level([0, 3, 4], [0, 3, 3], [0, 1, 2], [16, 16])
    with pytest.raises(TensorError, match="qo_indptr must be an int32 tensor"):
        HybridLevel(torch.arange(2), int32(0, 1), int32(4), int32(1))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (level([0, 3, 5], [0, 3, 3], [0, 1, 2], [16, 0]), "K2: level 0 covers 5 of 4 rows"),
        (level([0, 3], [0, 3], [0, 1, 2], [16]), "K2: level 0 covers 3 of 4 rows"),
        (HybridLevel.trusted(int32(0, 4, 3), int32(0, 3, 3), int32(0, 1, 2), int32(16, 0)), "B1: qo_indptr must start"),
        (level([0, 3, 4], [0, 3, 3], [0, 1, 2], [17, 0]), r"B2: kv_last_page_len\[0\] is 17"),
    ],
)
def test_check_finds_a_level_that_does_not_cover_the_rows(broken: HybridLevel, message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        FlashInferHybridData((broken, picture()[1]), torch.arange(4)).check(16)


def test_check_finds_boundaries_that_the_next_level_does_not_have() -> None:
    crossing = level([0, 2, 4], [0, 0, 1], [3], [0, 16])
    with pytest.raises(InvariantError, match=r"K2: level 1 has no boundary at rows \[3\]") as caught:
        FlashInferHybridData((picture()[0], crossing, picture()[1]), torch.arange(4)).check(16)
    assert "level 2: rows [0, 1, 2, 3, 4]" in str(caught.value)


def test_check_finds_a_sequence_without_pages_of_its_own() -> None:
    hollow = level([0, 1, 2, 3, 4], [0, 1, 2, 3, 3], [5, 6, 7], [10, 4, 16, 0])
    with pytest.raises(InvariantError, match="K2: the last level has a sequence without pages"):
        FlashInferHybridData((picture()[0], hollow), torch.arange(4)).check(16)
