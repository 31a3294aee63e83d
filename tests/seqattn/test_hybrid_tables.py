"""What a hybrid batch is packed from when it was packed before, and what must not be taken for a known batch."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from seqattn import (
    BadValueError,
    CacheDescriptor,
    CostModel,
    LengthError,
    PageAllocator,
    UnknownSequenceError,
    hybrid_tables,
    known_forest,
)
from tests.interrupts import interrupted
from tests.seqattn.packs import Asked, Packs, count_forests, reuse_whatever_changes

if TYPE_CHECKING:
    pass

PAGE_SIZE = 4
ALL = CostModel(level_overhead_us=0.0, reread_bytes_per_s=4e12)


@pytest.fixture(autouse=True)
def reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    reuse_whatever_changes(monkeypatch)


# -- what is reused ----------------------------------------------------------------------------------------------------


def family(num_sequences: int = 6, shared: int = 20, own: int = 5) -> tuple[CacheDescriptor, list[int], Packs]:
    """Sequences of a prompt and a few tokens of their own."""
    descriptor = CacheDescriptor(PageAllocator(4096, PAGE_SIZE))
    descriptor.allocate(["prompt"], [shared])
    ids = list(range(num_sequences))
    for seq_id in ids:
        descriptor.fork("prompt", seq_id)
        descriptor.extend(seq_id, own)
    return descriptor, ids, Packs(descriptor)


@pytest.mark.parametrize("model", [None, ALL])
def test_while_tables_only_grow_the_shared_levels_are_the_same_objects(
    model: CostModel | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor, ids, packs = family()
    first = packs.pack(ids, Asked(model=model))
    made = count_forests(monkeypatch)
    assert len(first.levels) == 2
    for step in range(24):
        descriptor.allocate_decoding(ids if step % 3 else ids[:2])
        data = packs.pack(ids, Asked(model=model))
        assert data.levels[0] is first.levels[0]
        assert data.order is first.order
    assert not made
    assert packs.num_reused >= 4


def test_if_only_lengths_have_changed_so_are_the_pages_of_the_last_level() -> None:
    descriptor, ids, packs = family()
    first = packs.pack(ids, Asked())
    descriptor.allocate_decoding(ids)
    data = packs.pack(ids, Asked())
    assert data.levels[1].kv_page_indices is first.levels[1].kv_page_indices
    assert data.levels[1].kv_last_page_len.tolist() == [2] * 6
    descriptor.truncate(0, descriptor.num_tokens(0) - 1)
    assert packs.pack(ids, Asked()).levels[1].kv_last_page_len.tolist() == [1, *[2] * 5]


def test_the_cost_model_is_asked_again_when_lengths_have_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor, ids, _ = family()
    asked: list[int] = []

    def kept(runs: list[Any], *_arguments: object) -> list[Any]:
        asked.append(len(runs))
        return runs

    monkeypatch.setattr(hybrid_tables, "runs_to_keep", kept)
    first = descriptor.pack_hybrid_for_flashinfer(ids, cost_model=ALL)
    for _ in range(64):
        descriptor.allocate_decoding(ids)
        data = descriptor.pack_hybrid_for_flashinfer(ids, cost_model=ALL)
        assert data.levels[0] is first.levels[0]
    assert len(asked) == 3
    descriptor.pack_hybrid_for_flashinfer(ids, cost_model=CostModel(level_overhead_us=0.0, reread_bytes_per_s=4e12))
    assert len(asked) == 3, "an equal model is no other"
    descriptor.pack_hybrid_for_flashinfer(ids, cost_model=CostModel())
    assert len(asked) == 4


def test_another_cost_model_decides_anew_about_the_same_forest(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ids, packs = family()
    packs.pack(ids, Asked())
    made = count_forests(monkeypatch)
    assert len(packs.pack(ids, Asked(model=CostModel(level_overhead_us=1e9))).levels) == 1
    assert len(packs.pack(ids, Asked(model=ALL)).levels) == 2
    assert len(packs.pack(ids, Asked(query_lens=[2] * 6)).levels) == 2
    assert len(packs.pack(ids, Asked(query_lens=[1] * 6)).levels) == 2
    assert not made


def test_an_open_sequence_that_grows_is_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences on the same pages: what they share ends where the limit of one does, and grows with it."""
    descriptor = CacheDescriptor(PageAllocator(64, PAGE_SIZE))
    descriptor.allocate([0], [17])
    pages = descriptor.data_of(0).kv_page_indices
    for seq_id, count in ((1, 2), (2, 3)):
        descriptor.cache_manager.ref(pages[:count])
        descriptor.attach(seq_id, pages[:count], count * PAGE_SIZE)
    packs = Packs(descriptor)
    assert len(packs.pack([0, 1, 2], Asked()).levels[0].kv_page_indices) == 1
    made = count_forests(monkeypatch)
    descriptor.extend(1, 1)  # its second page is full and may be shared
    assert len(packs.pack([0, 1, 2], Asked()).levels[0].kv_page_indices) == 2
    descriptor.extend(2, 1)
    assert packs.pack([0, 1, 2], Asked()).levels[1].kv_page_indices.tolist() == [pages[2]]
    assert made == {"changed": 2}


@pytest.mark.parametrize("asked", [Asked(query_lens=[9, 1, 1, 1, 1, 1]), Asked(num_tokens=[9, *[25] * 5])])
def test_a_limit_that_falls_below_what_is_shared_ends_the_run_earlier(asked: Asked) -> None:
    _, ids, packs = family()
    assert len(packs.pack(ids, Asked()).levels) == 2
    assert len(packs.pack(ids, asked).levels) == 3
    assert len(packs.pack(ids, Asked()).levels) == 2


@pytest.mark.parametrize("change", ["leave", "join", "both", "reorder"])
def test_a_batch_that_changes_by_few_is_not_compared_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor, ids, packs = family(8)
    packs.pack(ids, Asked())
    made = count_forests(monkeypatch)
    if change in ("leave", "both"):
        descriptor.release([ids.pop(3)])
    if change in ("join", "both"):
        descriptor.fork("prompt", 9)
        descriptor.extend(9, 3)
        ids.insert(2, 9)
    if change == "reorder":
        ids.reverse()
    packs.pack(ids, Asked())
    assert made == {"changed": 1}


def test_a_batch_of_which_much_is_new_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_forest, "_JOINED", 16)
    descriptor, ids, packs = family(16)
    packs.pack(ids, Asked())
    made = count_forests(monkeypatch)
    for seq_id in (16, 17):
        descriptor.fork("prompt", seq_id)
    packs.pack([*ids, 16], Asked())
    packs.pack([*ids[:10], 17], Asked())
    assert made == {"changed": 1, "built": 1}


def test_batches_that_take_turns_are_all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor, ids, packs = family(8, own=9)
    kinds = [(ids, Asked()), (ids[:5], Asked(query_lens=[2] * 5)), (ids[4:], Asked(model=ALL))]
    first = [packs.pack(*kind) for kind in kinds]
    made = count_forests(monkeypatch)
    for _ in range(12):
        descriptor.allocate_decoding(ids)
        for kind, old in zip(kinds, first, strict=True):
            assert packs.pack(*kind).levels[0] is old.levels[0]
    assert not made


def test_memory_is_bounded_and_no_ended_sequence_is_kept() -> None:
    descriptor, ids, _ = family(12)
    data = descriptor.data_of(0)
    before = sys.getrefcount(data), sys.getrefcount(data.table)
    for i in range(12):
        descriptor.pack_hybrid_for_flashinfer(ids[i:] + ids[:i])
    after = sys.getrefcount(data), sys.getrefcount(data.table)
    assert after == before
    assert descriptor._hybrid is not None
    assert len(descriptor._hybrid._known) == 8


# -- what must not be taken for a known batch --------------------------------------------------------------------------


def test_what_is_wrong_is_refused_whatever_was_packed_before() -> None:
    descriptor, ids, _ = family(2)
    wrong: list[tuple[list[Any], dict[str, Any], type[Exception]]] = [
        ([np.array([0]), 1], {}, BadValueError),
        ([torch.tensor(0), 1], {}, UnknownSequenceError),
        ([0, "nobody"], {}, UnknownSequenceError),
        ([0, 0], {}, ValueError),
        (ids, {"query_lens": [1]}, LengthError),
        (ids, {"query_lens": [0, 1]}, LengthError),
        (ids, {"num_tokens": [26, 1]}, LengthError),
        (ids, {"num_tokens": [1, 0]}, LengthError),
        (ids, {"cost_model": "fast"}, BadValueError),
    ]
    for _ in range(2):
        for seq_ids, options, error in wrong:
            with pytest.raises(error):
                descriptor.pack_hybrid_for_flashinfer(seq_ids, **options)
        descriptor.pack_hybrid_for_flashinfer(ids)
    descriptor.truncate(1, 0)
    with pytest.raises(LengthError, match=r"query_lens\[1\] is 1 for a sequence of 0 tokens"):
        descriptor.pack_hybrid_for_flashinfer(ids)


def test_an_empty_batch_is_one_empty_level() -> None:
    _, ids, packs = family(3)
    for batch in ([], [], ids, []):
        assert len(packs.pack(batch, Asked(model=ALL)).levels) == 1 + bool(batch)


def test_a_sequence_that_starts_again_under_its_id_is_another() -> None:
    descriptor, ids, packs = family(4)
    packs.pack(ids, Asked())
    descriptor.release([2])
    descriptor.allocate([2], [25])
    data = packs.pack(ids, Asked())
    assert sorted(len(pages) for pages in data.unpack()) == [7] * 4


def test_query_lens_in_an_array_that_the_caller_changes_are_other_ones() -> None:
    descriptor, ids, packs = family(3, own=9)
    rows = np.array([2, 1, 1])
    for _ in range(2):
        data = descriptor.pack_hybrid_for_flashinfer(ids, query_lens=rows)  # type: ignore[arg-type]  # as some pass them
        packs.prove(data, ids, Asked(rows.tolist()))
        rows[2] = 3


@pytest.mark.parametrize("kept", [25, 9])
def test_a_table_that_was_cut_and_is_as_long_again_is_another(kept: int) -> None:
    """The pages that it gave back are in another sequence by then."""
    descriptor, ids, packs = family(4, own=9)
    packs.pack(ids, Asked())
    descriptor.truncate(2, kept)
    descriptor.allocate(["other"], [64])
    descriptor.extend(2, 29 - kept)
    packs.pack(ids, Asked())
    packs.pack(ids[1:], Asked())


# -- interrupts --------------------------------------------------------------------------------------------------------


FILES = ("hybrid_tables.py", "known_forest.py", "buffers.py")


@pytest.mark.parametrize("change", ["first", "grown", "joined"])
def test_a_pack_that_is_interrupted_leaves_nothing_wrong_behind(change: str) -> None:
    for line in range(1, 400):
        descriptor, ids, packs = family(8)
        if change != "first":
            packs.pack(ids, Asked())
            descriptor.extend(3, PAGE_SIZE)
        if change == "joined":
            descriptor.release([ids.pop()])
            descriptor.fork(2, 20)
            ids.append(20)
        if not interrupted(partial(descriptor.pack_hybrid_for_flashinfer, ids), line, FILES):
            break
        packs.pack(ids, Asked())
        descriptor.allocate_decoding(ids)
        packs.pack(ids, Asked())
    assert 20 < line < 399
