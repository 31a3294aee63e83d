"""Wrappers and the memory that they are given: staged, sized, kept while it is copied; flashinfer is stood in for."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from seqattn.append import sent, side_by_side
from seqattn.attention.calls import KernelCall
from seqattn.attention.places import PAGES_AT
from seqattn.attention.views import Spans
from seqattn.attention.wrapper import Wrapper
from seqattn.attention.wrapper_set import WrapperSet, wait_for
from seqattn.cache import PagedKVCacheManager
from seqattn.errors import LengthError
from seqattn.load import SHORT, SLICES, Cut, Groups, Heads, loads_of
from tests.seqattn.test_calls import HEAD_DIM, NUM_KV_HEADS, in_line


def test_staged_arrays_are_aligned_and_kept() -> None:
    manager = PagedKVCacheManager(4, 16, 1, 4, torch.float32, "cpu")
    wrappers = WrapperSet(manager, 1, 132, {})
    arrays = [np.arange(n, dtype=np.int32) for n in (3, 0, 9, 5)]
    for _ in range(2):
        sent, kept = wrappers.stage(arrays[:2], arrays[2:])
        assert [t.tolist() for t in (*sent, *kept)] == [a.tolist() for a in arrays]
        assert all(t.data_ptr() % 32 == 0 for t in (*sent, *kept) if len(t))
        sent, kept = wrappers.stage(arrays, [], [0, 3])
        assert not kept
        assert [t.tolist() for t in sent] == [a.tolist() for a in arrays]
        assert [t.data_ptr() % 32 // 4 for t in sent if len(t)] == [PAGES_AT, 0, PAGES_AT]
        assert wrappers.stage([], []) == ([], [])


def test_wrappers_that_are_made_in_inference_mode_can_be_planned_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep memory that later plans write to, which torch would refuse."""

    class Made:
        def __init__(self, *_: object, **__: object) -> None:
            self.memory = [torch.zeros(1)]

        def reset_workspace_buffer(self, *given: torch.Tensor) -> None:
            self.memory += [*given, torch.zeros(1)]

    kinds = ("BatchPrefillWithPagedKVCache", "BatchPrefillWithRaggedKVCache", "BatchDecodeWithPagedKVCache")
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**{f"{kind}Wrapper": Made for kind in kinds}))
    manager = PagedKVCacheManager(4, 16, 1, 4, torch.float32, "cpu")
    wrappers = WrapperSet(manager, 1, 132, {})
    with torch.inference_mode():
        made = [wrappers._make(kind, wrappers.workspace(0, 64)) for kind in ("fa2", "fa3 in line", "decode", "short")]
        for each in made:
            wrappers._give(each, wrappers.workspace(1, 64), 64)
    assert [memory.is_inference() for each in made for memory in each.memory] == [False] * 16


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_short_lists_get_the_kernel_that_was_predicted(page_size: int) -> None:
    rng = np.random.default_rng(0)
    manager = PagedKVCacheManager(4, page_size, 8, 128, torch.bfloat16, "cpu")
    wrappers, heads = WrapperSet(manager, 32, 132, {}), Heads(32, 8)
    others = WrapperSet(PagedKVCacheManager(4, page_size, 8, 64, torch.bfloat16, "cpu"), 32, 132, {})
    found = []
    for _ in range(400):
        count, most = int(rng.integers(1, 300)), int(rng.integers(2, 240))
        lens = rng.integers(most // 2 if rng.random() < 0.5 else 1, most, count)
        indptr = np.cumsum([0, *-(-lens // page_size)], dtype=np.int32)
        pages, last = np.zeros(indptr[-1], dtype=np.int32), ((lens - 1) % page_size + 1).astype(np.int32)
        call = KernelCall(
            "decode", np.arange(count + 1, dtype=np.int32), indptr, pages, last,
            causal=True, by_group=False, first_query=None, first_part=0, num_rows=count,
        )  # fmt: skip
        load, _ = loads_of(Cut.of([Groups(np.ones(count, np.int64), lens, int(lens.sum()))]), heads, 132, SLICES)
        assert wrappers._is_short(call) == (load.kernel[0, 0] == SHORT)
        found.append(wrappers._is_short(call))
        assert not others._is_short(call), "not measured with heads of 64"
    assert 50 < sum(found) < 350


def test_what_lies_behind_a_schedule_in_a_graph_is_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks without work read it in flashinfer 0.6, where nothing is split."""

    class Made:
        def __init__(self, *_: object, **__: object) -> None: ...

        def reset_workspace_buffer(self, _: torch.Tensor, ints: torch.Tensor) -> None:
            self._pin_memory_int_workspace_buffer = torch.full(ints.shape, 99, dtype=torch.uint8)

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Made))
    wrappers = WrapperSet(PagedKVCacheManager(4, 16, 1, 4, torch.float32, "cpu"), 4, 132, {})
    indptr = np.arange(65, dtype=np.int32)
    call = KernelCall(
        "decode", indptr, indptr, indptr[:64], indptr[1:],
        causal=True, by_group=False, first_query=None, first_part=0, num_rows=64,
    )  # fmt: skip
    names = ("qo_indptr", "kv_page_indptr", "kv_page_indices", "kv_last_page_len")
    wrapper = wrappers.fixed(call, 0, dict.fromkeys(names, torch.zeros(0)))
    assert not wrapper.made._pin_memory_int_workspace_buffer.any()


def test_workspaces_are_large_enough_for_what_is_planned() -> None:
    """Against flashinfer's own formulas: two blocks a multiprocessor, a tile of float32 each; 7 numbers for a tile."""
    manager = PagedKVCacheManager(4, 16, 8, 128, torch.bfloat16, "cpu")
    wrappers = WrapperSet(manager, 64, 132, {})

    def call(kernel: Any, *rows: int) -> KernelCall:  # noqa: ANN401  a literal
        indptr = np.cumsum([0, *rows], dtype=np.int32)
        none = np.zeros(len(rows) + 1, dtype=np.int32)
        return KernelCall(
            kernel,
            indptr,
            none,
            none,
            none[:-1],
            causal=False,
            by_group=False,
            first_query=None,
            first_part=0,
            num_rows=sum(rows),
        )

    padded = 2 * 132 // 8
    assert wrappers._workspace_sizes(call("fa2", 300))[0] >= 64 * padded * 128 * (128 + 1) * 4
    assert wrappers._workspace_sizes(call("fa2", *[100] * 900))[1] >= 12 * 900 * 7
    assert wrappers._workspace_sizes(call("fa3", *[8192] * 64))[1] >= 28 * 64 * 64 * 64


def test_a_graph_that_splits_no_lists_has_no_memory_for_their_parts() -> None:
    manager = PagedKVCacheManager(4, 16, 8, 128, torch.bfloat16, "cpu")
    wrappers = WrapperSet(manager, 32, 132, {})

    def sizes(num_sequences: int) -> tuple[int, int]:
        indptr = np.arange(num_sequences + 1, dtype=np.int32)
        call = KernelCall("decode", indptr, indptr, indptr, indptr[1:], True, False, None, 0, num_sequences)
        assert bool(wrappers.options(call)) == (num_sequences >= 2 * 132 // 8)
        return wrappers._workspace_sizes(call, fixed=True)

    assert sizes(256)[0] == sizes(2048)[0] == 32 << 20
    wide = WrapperSet(PagedKVCacheManager(4, 16, 1, 256, torch.bfloat16, "cpu"), 16, 132, {})
    indptr = np.arange(17, dtype=np.int32)
    call = KernelCall("decode", indptr, indptr, indptr, indptr[1:], True, False, None, 0, 16)
    assert wide._workspace_sizes(call, fixed=True)[0] >= 16 * 264 * 16 * 257 * 4, "where lists are split there is some"


class FakeEvent:
    """Notes what it is asked."""

    log: ClassVar[list[str]] = []

    def record(self, _: object) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")


def test_pinned_memory_is_kept_until_its_copies_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that torch does not know of: who drops a set of wrappers waits for them."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(FakeEvent, "log", [])
    wrappers = WrapperSet(PagedKVCacheManager(4, 16, 8, 128, torch.bfloat16, "cpu"), 32, 132, {})
    for _ in range(2):
        with wrappers.in_use():
            pass
    assert FakeEvent.log == ["record", "wait", "record"]
    del wrappers
    assert FakeEvent.log[3:] == ["wait"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    wait_for(FakeEvent())  # type: ignore[arg-type]
    assert FakeEvent.log[4:] == [], "a capture may not wait"


def test_a_call_that_was_planned_for_is_known_by_itself_the_next_time() -> None:
    first, second = (in_line(5, 6, 7, 8, 9).calls[0] for _ in range(2))
    wrapper = Wrapper(object(), 0, 0)
    wrapper.done(first)
    assert wrapper.is_planned_for(first)
    assert wrapper.is_planned_for(second)
    assert wrapper.call is second
    assert not wrapper.is_planned_for(in_line(6, 7, 8, 9, 10).calls[0])


def test_pages_side_by_side_are_an_array_of_the_memory_that_the_manager_has() -> None:
    manager = PagedKVCacheManager(9, 4, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu", num_layers=2)
    spans = Spans(manager)
    for _ in range(2):
        for layer in range(2):
            pages, arrays = manager.layer_tensors(layer), spans.of(layer, (3, 4))
            assert manager.layer_tensors(layer) is pages
            assert pages[0].data_ptr() == manager.key_cache[layer].data_ptr()
            for cache, array in zip(pages, arrays, strict=True):
                assert array.shape == (16, NUM_KV_HEADS, HEAD_DIM)
                assert array.data_ptr() == cache[3].data_ptr()
            assert spans.of(layer, (3, 4)) is arrays
        manager.key_cache = manager.key_cache.clone()  # who moves the memory is followed
    for first in range(70):
        spans.of(0, (first % 5, 1 + first // 20))
    assert len(spans._known[0][1]) <= 64
    for bad in (2, -1, 2.0, None):
        with pytest.raises(LengthError):
            manager.layer_tensors(bad)  # type: ignore[arg-type]
    assert manager.layer_tensors(np.int64(1)) is manager.layer_tensors(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0, 1, 3, 8])
def test_rows_at_an_odd_place_in_memory_are_copied(first: int) -> None:
    """They are contiguous, but kernels load 16 bytes at a time."""
    memory = torch.arange(2 * 3 * 64 + 8, dtype=torch.float16)
    rows = memory[first : first + 2 * 3 * 64].view(2, 3, 64)
    found = side_by_side(rows)
    assert found.data_ptr() % 16 == 0
    assert found.is_contiguous()
    assert torch.equal(found, rows)
    assert (found is rows) == (first % 8 == 0)


def test_rows_whose_heads_lie_apart_are_copied_only_where_they_must() -> None:
    fused = torch.randn(4, 12, 64).half()
    assert side_by_side(fused[:, 4:8]).data_ptr() == fused[:, 4:8].data_ptr()
    for rows in (fused.transpose(1, 2), fused[..., ::2], torch.randn(4, 3, 65).half()[..., :64]):
        found = side_by_side(rows)
        assert found.is_contiguous()
        assert torch.equal(found, rows)


def test_arrays_are_sent_as_they_are() -> None:
    assert sent(np.arange(5, dtype=np.int32), torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]
