"""A batch is packed right whatever happened since the last time, and few pages more do not cost a copy of the rest."""

from __future__ import annotations

import random
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from seqattn import CacheDescriptor, PageAllocator, UnknownSequenceError
from tests.interrupts import interrupted

if TYPE_CHECKING:
    from seqattn import FlashInferPackedData

PAGE_SIZE = 4


def batch(num_sequences: int, num_tokens: int = 6) -> CacheDescriptor:
    descriptor = CacheDescriptor(PageAllocator(4096, PAGE_SIZE))
    descriptor.allocate(range(num_sequences), [num_tokens + i % PAGE_SIZE for i in range(num_sequences)])
    return descriptor


def truth(descriptor: CacheDescriptor, seq_ids: list[int]) -> list[list[int]]:
    tables = [descriptor.seq_id_to_data[seq_id].kv_page_indices for seq_id in seq_ids]
    lasts = [descriptor.seq_id_to_data[seq_id].last_page_len for seq_id in seq_ids]
    return [[page for table in tables for page in table], np.cumsum([0, *map(len, tables)]).tolist(), lasts]


def found(packed: FlashInferPackedData) -> list[list[int]]:
    packed.validate(PAGE_SIZE)
    return [packed.kv_page_indices.tolist(), packed.kv_page_indptr.tolist(), packed.kv_last_page_len.tolist()]


def step(descriptor: CacheDescriptor, dice: random.Random, running: list[int]) -> None:
    """Something that may happen between two packs of a batch."""
    seq_id = dice.choice(running)
    kind = dice.randrange(10)
    if kind < 5:
        descriptor.allocate(running, [dice.choice([1, 1, 1, 2, 9]) for _ in running])
    elif kind < 7:
        descriptor.allocate([seq_id], [dice.randint(1, 20)])
    elif kind == 7:
        descriptor.truncate(seq_id, dice.randint(1, descriptor.num_tokens(seq_id)))
    elif kind == 8:
        descriptor.release([seq_id])
        descriptor.allocate([seq_id], [dice.randint(1, 20)])
    else:
        # The last page of both is shared after the cut, and copied when one of them grows.
        cut = PAGE_SIZE * (descriptor.num_tokens(seq_id) // PAGE_SIZE)
        descriptor.fork(seq_id, "fork")
        if cut:
            descriptor.truncate(seq_id, cut - 1)
            descriptor.allocate([seq_id], [2])
        descriptor.release(["fork"])


@pytest.mark.parametrize("seed", range(8))
def test_packs_are_right_through_random_lives_and_stay_as_they_are(seed: int) -> None:
    dice, running = random.Random(seed), list(range(12))
    descriptor = batch(len(running))
    kept: list[tuple[FlashInferPackedData, list[list[int]]]] = []
    for _ in range(150):
        step(descriptor, dice, running)
        ids = running if dice.random() < 0.8 else dice.sample(running, 5)
        packed = descriptor.pack_for_flashinfer(ids)
        kept = [*kept[-dice.randrange(4) :], (packed, truth(descriptor, ids))] if dice.random() < 0.9 else []
        assert [found(data) for data, _ in kept] == [right for _, right in kept]
        del packed


FILES = ("flat_tables.py", "buffers.py")


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_pack_that_is_interrupted_leaves_nothing_wrong_behind(is_moved: bool) -> None:
    ids = list(range(16))
    for line in range(1, 200):
        descriptor = batch(16, 40)
        if is_moved:
            descriptor.pack_for_flashinfer(ids)
            descriptor.allocate([3, 7], [PAGE_SIZE, 2 * PAGE_SIZE])
        if not interrupted(partial(descriptor.pack_for_flashinfer, ids), line, FILES):
            break
        assert found(descriptor.pack_for_flashinfer(ids)) == truth(descriptor, ids), f"interrupted at line {line}"
        descriptor.allocate([5], [PAGE_SIZE])
        assert found(descriptor.pack_for_flashinfer(ids)) == truth(descriptor, ids), f"interrupted at line {line}"
    assert 20 < line < 199


def test_sequences_that_have_ended_are_not_kept() -> None:
    descriptor, ids = batch(8), list(range(8))
    first = weakref.ref(descriptor.pack_for_flashinfer(ids).kv_page_indices)
    ended = [sys.getrefcount(data) for data in descriptor.seq_id_to_data.values()]
    descriptor.release([0])
    left = [sys.getrefcount(data) for data in descriptor.seq_id_to_data.values()]
    assert max(left) < min(ended)
    assert first() is None


@pytest.mark.parametrize("wrong", [[np.array([0])], [[0]], ["nobody"], [0, "nobody"]])
def test_ids_that_are_none_are_refused_whatever_was_packed_before(wrong: list[Any]) -> None:
    descriptor = batch(2)
    for ids in ([0], [0, 1]):
        descriptor.pack_for_flashinfer(ids)
        descriptor.allocate([0], [PAGE_SIZE])
        with pytest.raises(UnknownSequenceError):
            descriptor.pack_for_flashinfer(wrong)


def test_a_pack_of_part_of_the_tokens_in_between_does_not_cost_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor, ids = batch(64, 100), list(range(64))
    for _ in range(2):
        descriptor.pack_for_flashinfer(ids)
        descriptor.pack_for_flashinfer(ids, num_tokens=[5] * 64)
    descriptor.allocate([3], [PAGE_SIZE])
    refuse_to_copy(monkeypatch)
    assert found(descriptor.pack_for_flashinfer(ids)) == truth(descriptor, ids)


def refuse_to_copy(patch: pytest.MonkeyPatch) -> None:
    def concatenate(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("every table is copied")

    patch.setattr(np, "concatenate", concatenate)


@pytest.mark.parametrize("is_kept", [False, True])
def test_few_tables_that_grow_do_not_cost_a_copy_of_all(monkeypatch: pytest.MonkeyPatch, is_kept: bool) -> None:
    descriptor, ids = batch(64, 100), list(range(64))
    kept = [descriptor.pack_for_flashinfer(ids)]
    for at in range(2):  # as long as each pack is kept until the next one, two of them take turns
        descriptor.allocate([at], [PAGE_SIZE])
        kept = [descriptor.pack_for_flashinfer(ids)]
    refuse_to_copy(monkeypatch)
    for at in range(0, 40, 2):
        descriptor.allocate([at, at + 1, 63], [PAGE_SIZE, 1, 2 * PAGE_SIZE])
        if not is_kept:
            kept.clear()
        kept = [descriptor.pack_for_flashinfer(ids)]
        assert found(kept[0]) == truth(descriptor, ids)


def test_a_sequence_outside_the_batch_does_not_cost_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor, ids = batch(64), list(range(63))
    descriptor.pack_for_flashinfer(ids)
    refuse_to_copy(monkeypatch)
    descriptor.allocate([63, "new"], [50, 50])
    assert found(descriptor.pack_for_flashinfer(ids)) == truth(descriptor, ids)


@pytest.mark.parametrize("change", ["truncate", "release", "most grow"])
def test_what_cannot_be_moved_is_copied(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    descriptor, ids = batch(8), list(range(8))
    descriptor.pack_for_flashinfer(ids)
    if change == "truncate":
        descriptor.truncate(3, 1)
    elif change == "release":
        descriptor.release([3])
        descriptor.allocate([3], [6])
    else:
        descriptor.allocate(ids, [PAGE_SIZE] * 8)
    refuse_to_copy(monkeypatch)
    with pytest.raises(AssertionError, match="every table is copied"):
        descriptor.pack_for_flashinfer(ids)
