"""The calls of a batch: computed one by one and merged by their codes, they are dense attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqattn.append import sent, side_by_side
from seqattn.attention.calls import Choice, KernelCall, Work, is_next, next_work, work_of
from seqattn.attention.choice import choose
from seqattn.attention.flashinfer_backend import FlashInferBackend
from seqattn.attention.layers import LayerViews
from seqattn.attention.plan import BatchPlan, Planner, plan_batch
from seqattn.attention.torch_backend import merge_states
from seqattn.attention.wrappers import Wrapper, WrapperSet
from seqattn.cache import PagedKVCacheManager
from seqattn.device import Device, Groups, Heads
from seqattn.errors import LengthError
from seqattn.hybrid import pack_hybrid
from tests.seqattn.truth import FOREST, Batch, batch_of, batches, dense_attention, fill, pack

HEADS_EACH, NUM_KV_HEADS, HEAD_DIM = 2, 2, 4


def plan_of(batch: Batch, manager: PagedKVCacheManager, *, causal: bool = True) -> BatchPlan:
    data = pack_hybrid(
        batch.tables, batch.num_tokens, page_size=batch.page_size, query_lens=batch.query_lens, cost_model=None
    )
    return plan_batch(manager, data, None, causal=causal)


def gathered(work: Work, q: torch.Tensor) -> torch.Tensor:
    """What `seqattn.kernels.gather_queries` writes."""
    rows = []
    for code in work.query_codes.tolist():
        row = q[code // 2]
        by_group = row.view(NUM_KV_HEADS, HEADS_EACH, HEAD_DIM).transpose(0, 1).reshape(row.shape)
        rows.append(by_group if code % 2 else row)
    return torch.stack(rows) if rows else q[:0]


def computed(
    call: KernelCall, q: torch.Tensor, manager: PagedKVCacheManager, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel: groups of rows over lists of pages, each KV head for as many query heads as the rows have.

    A call with a span knows no lists: where its tokens begin and end in the array is all that it is told.
    """
    heads = NUM_KV_HEADS if call.by_group else q.shape[1]
    pages, last = call.kv_page_indices, call.kv_last_page_len.tolist()
    if call.span is not None:
        pages = np.arange(call.span[0], sum(call.span), dtype=np.int32)
        if len(pages) < call.kv_page_indptr[-1]:  # padding, behind the end: whatever it is, nobody reads its results
            pages = np.concatenate((pages, call.kv_page_indices[len(pages) :]))
        else:
            last = [page_size] * len(last)
    tables = np.split(pages, call.kv_page_indptr[1:-1])
    tokens = [(len(t) - 1) * page_size + n for t, n in zip(tables, last, strict=True)]
    batch = Batch(page_size, tables, tokens, np.diff(call.qo_indptr).tolist())
    found = dense_attention(manager, batch, q.reshape(-1, heads, HEAD_DIM), causal=call.causal)
    return found.out.view(-1, q.shape[1], HEAD_DIM), found.lse.view(-1, q.shape[1])


def merged(work: Work, parts: tuple[torch.Tensor, torch.Tensor], row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `seqattn.kernels.merge_parts` writes to a row."""
    num_heads = NUM_KV_HEADS * HEADS_EACH
    out, lse = torch.zeros(num_heads, HEAD_DIM).double(), torch.full((num_heads,), -math.inf).double()
    for code in work.part_codes[work.part_indptr[row] : work.part_indptr[row + 1]].tolist():
        its = [part[code // 2] for part in parts]
        if code % 2:
            its = [t.view(HEADS_EACH, NUM_KV_HEADS, *t.shape[1:]).transpose(0, 1).reshape(t.shape) for t in its]
        out, lse = merge_states(out, lse, its[0], its[1])
    return out, lse


def check(
    plan: BatchPlan,
    choices: Sequence[Choice],
    manager: PagedKVCacheManager,
    batch: Batch,
    causal: bool,
    *,
    work: Work | None = None,
    larger: Batch | None = None,
) -> None:
    """Computes a batch call by call; `work` may be one with rows of padding behind the batch's, as in `larger`."""
    larger = larger or batch
    shape = (sum(larger.query_lens), NUM_KV_HEADS * HEADS_EACH, HEAD_DIM)
    q = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    work = work or work_of(plan, choices, HEADS_EACH, batch.page_size)
    queries = gathered(work, q)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for call in work.calls:
        first = call.first_query
        mine = q[: call.num_rows] if first is None else queries[first : first + call.num_rows]
        assert call.first_part == sum(len(out) for out, _ in found)
        found.append(computed(call, mine, manager, batch.page_size))
        assert {getattr(call, name).dtype for name in ("qo_indptr", "kv_page_indptr", "kv_last_page_len")} == {
            np.dtype(np.int32)
        }
    parts = torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])
    assert len(parts[0]) == work.num_parts
    expected = dense_attention(manager, larger, q, causal=causal)
    for row in range(0 if work.direct else plan.num_rows):
        out, lse = merged(work, parts, row)
        assert torch.allclose(out, expected.out[row], atol=1e-5)
        assert torch.allclose(lse, expected.lse[row], atol=1e-5)
    if work.direct:
        assert torch.allclose(parts[0], expected.out, atol=1e-5)


WAYS = st.sampled_from([Choice("fa2"), Choice("fa3", 1), Choice("fa3", 2), Choice("fa3", 7)])


@given(batches(max_sequences=5, max_pages=4), st.booleans(), st.data())
def test_calls_and_codes_are_dense_attention(batch: Batch, causal: bool, data: st.DataObject) -> None:
    num_pages = 1 + max(int(table.max()) for table in batch.tables)
    manager = PagedKVCacheManager(num_pages, batch.page_size, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    fill(manager, batch, 0)
    plan = plan_of(batch, manager, causal=causal)
    choices = [data.draw(WAYS) for _ in plan.levels]
    if set(batch.query_lens) == {1} and data.draw(st.booleans()):
        choices[-1] = Choice("decode")
    check(plan, choices, manager, batch, causal)


def test_the_picture_of_the_calls() -> None:
    batch = batch_of([[0, 1, 2, 3, 4, 5 + i] for i in range(3)], [2] * 3, 4, [1] * 3)
    manager = PagedKVCacheManager(8, 4, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    work = work_of(plan_of(batch, manager), [Choice("fa3", 2), Choice("decode")], HEADS_EACH, 4)
    shared, own = work.calls
    assert shared.qo_indptr.tolist() == [0, 6, 12]
    assert shared.kv_page_indptr.tolist() == [0, 2, 5]
    assert work.query_codes.tolist() == [1, 3, 5, 1, 3, 5]
    assert (shared.first_query, shared.first_part, own.first_query, own.first_part) == (0, 0, None, 6)
    assert work.part_indptr.tolist() == [0, 3, 6, 9]
    assert work.part_codes.tolist() == [1, 7, 12, 3, 9, 14, 5, 11, 16]


def in_line(*prefix: int, num_sequences: int = 3, page_size: int = 256, last: int | None = None) -> Work:
    """Sequences that share these pages, in two slices of fa3; checked to be dense attention."""
    own = [[900 + i] for i in range(num_sequences)]
    batch = batch_of([[*prefix, *pages] for pages in own], [last or 7] * num_sequences, page_size, [1] * num_sequences)
    manager = PagedKVCacheManager(1000, page_size, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    fill(manager, batch, 0)
    plan, choices = plan_of(batch, manager), [Choice("fa3", 2), Choice("decode")]
    work = work_of(plan, choices, HEADS_EACH, page_size, has_spans=True)
    check(plan, choices, manager, batch, True, work=work)
    assert work_of(plan, choices, HEADS_EACH, page_size).calls[0].span is None, "not in every layout"
    return work


def test_a_list_of_pages_side_by_side_is_read_as_one_array() -> None:
    call = in_line(5, 6, 7, 8, 9).calls[0]
    assert call.span == (5, 5)
    assert call.kind == ("fa3 in line", True)
    assert call.kv_page_indptr.tolist() == [0, 2, 5]
    assert in_line(*range(40, 48), page_size=128).calls[0].span == (40, 8)


def test_other_lists_are_read_page_by_page() -> None:
    for prefix in ((5, 6, 7, 9, 10), (9, 8, 7, 6, 5), (5, 6, 8, 7, 9), (0, 2, 4, 6, 8)):
        assert in_line(*prefix).calls[0].span is None
    assert in_line(*range(5, 12), page_size=16).calls[0].span is None, "slices too short to be worth it"


def test_several_lists_are_read_page_by_page() -> None:
    """Behind the end of a list lies what belongs to others, and may hold NaN."""
    tables = [[*range(8), 20], [*range(8), 21], [*range(8, 16), 22], [*range(8, 16), 23]]
    batch = batch_of(tables, [256] * 4, 256, [1] * 4)
    manager = PagedKVCacheManager(24, 256, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    plan = plan_of(batch, manager)
    work = work_of(plan, [Choice("fa3", 2), Choice("decode")], HEADS_EACH, 256, has_spans=True)
    assert work.calls[0].span is None


def test_tokens_in_line_are_known_to_the_planner() -> None:
    batch = batch_of([[*range(40), 50 + i] for i in range(8)], [16] * 8, 16, [1] * 8)
    manager = PagedKVCacheManager(64, 16, 8, HEAD_DIM, torch.float32, "cpu")
    seen: list[bool] = []

    def slices_of(shared: Sequence[Groups], _: Groups) -> list[int]:
        seen.append(shared[0].in_line)
        return [1]

    for has_spans in (True, False):
        choose(plan_of(batch, manager), slices_of, 16, has_fa3=True, has_spans=has_spans)
    assert seen == [True, False]


def test_a_plain_batch_is_one_call_without_gathering() -> None:
    manager = PagedKVCacheManager(14, 16, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    plan = plan_batch(manager, pack(FOREST), None, causal=True)
    work = work_of(plan, [Choice("decode")], HEADS_EACH, 16)
    assert work.direct
    assert not len(work.query_codes)


@pytest.mark.parametrize(("rows", "kernel"), [(1, "decode"), (3, "fa2"), (200, "fa3")])
def test_the_last_level_is_computed_by_its_rows(rows: int, kernel: str) -> None:
    batch = batch_of([[*range(20), 20 + i] for i in range(4)], [16] * 4, 16, [rows] * 4)
    manager = PagedKVCacheManager(64, 16, 8, HEAD_DIM, torch.float32, "cpu")
    plan, device = plan_of(batch, manager), Device()

    def slices_of(shared: Sequence[Groups], last: Groups) -> list[int]:
        return device.best(shared, Heads(), last)[1]

    assert choose(plan, slices_of, 16, has_fa3=True)[-1].kernel == kernel
    without_fa3 = choose(plan, lambda shared, _: [0] * len(shared), 16, has_fa3=False)
    assert "fa3" not in {choice.kernel for choice in without_fa3}


def test_staged_arrays_are_aligned_and_kept() -> None:
    manager = PagedKVCacheManager(4, 16, 1, 4, torch.float32, "cpu")
    wrappers = WrapperSet(manager, 1, 132, {})
    arrays = [np.arange(n, dtype=np.int32) for n in (3, 0, 9, 5)]
    for _ in range(2):
        sent, kept = wrappers.stage(arrays[:2], arrays[2:])
        assert [t.tolist() for t in (*sent, *kept)] == [a.tolist() for a in arrays]
        assert all(t.data_ptr() % 16 == 0 for t in (*sent, *kept) if len(t))


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
    monkeypatch.setattr(FakeEvent, "log", [])
    wrappers = WrapperSet(PagedKVCacheManager(4, 16, 8, 128, torch.bfloat16, "cpu"), 32, 132, {})
    for _ in range(2):
        with wrappers.in_use():
            pass
    assert FakeEvent.log == ["record", "wait", "record"]
    del wrappers
    assert FakeEvent.log[3:] == ["wait"]


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
    views = LayerViews(manager)
    for _ in range(2):
        for layer in range(2):
            pages, arrays = views.pages(layer), views.span(layer, (3, 4))
            for cache, array in zip(pages, arrays, strict=True):
                assert array.shape == (16, NUM_KV_HEADS, HEAD_DIM)
                assert array.data_ptr() == cache[3].data_ptr()
            assert views.span(layer, (3, 4)) is arrays
        manager.key_cache = manager.key_cache.clone()  # who moves the memory is followed
    for first in range(70):
        views.span(0, (first % 5, 1 + first // 20))
    assert len(views._spans[0]) <= 64
    with pytest.raises(LengthError):
        views.pages(2)


def decoding(num_own: int) -> Batch:
    """Four sequences on 20 pages, with so many pages of their own."""
    tables = [[*range(20), *range(20 + num_own * i, 20 + num_own * (i + 1))] for i in range(4)]
    return batch_of(tables, [16] * 4, 16, [1] * 4)


def test_a_step_that_follows_needs_nothing_of_the_tensors_of_the_step_before() -> None:
    """Packed tensors may be written anew after a plan."""
    manager = PagedKVCacheManager(64, 16, 8, 4, torch.float32, "cpu")
    planner, choices = Planner(manager), [Choice("fa2"), Choice("decode")]
    data = [
        pack_hybrid(b.tables, b.num_tokens, page_size=16, query_lens=None, cost_model=None) for b in [decoding(2)] * 2
    ]
    first = planner.plan(data[0], None, causal=True)
    work = work_of(first, choices, 4, 16)
    for level in data[0].levels:
        level.qo_indptr.zero_()
    second = planner.plan(data[1], None, causal=True)
    assert is_next(first, second)
    assert next_work(work, second).calls[-1].qo_indptr.tolist() == [0, 1, 2, 3, 4]


def test_ways_are_chosen_anew_when_sequences_have_grown() -> None:
    manager = PagedKVCacheManager(200, 16, 8, 128, torch.bfloat16, "cpu")
    backend: Any = object.__new__(FlashInferBackend)  # without what needs a device
    backend.manager, backend.heads_each, backend.heads = manager, 4, Heads()
    backend._known, backend._last_slices, backend.layers = None, (b"", []), LayerViews(manager)
    asked = []

    class Costs:
        has_fa3 = True

        def best(self, shared: Sequence[Groups], _: Heads, last: Groups) -> tuple[float, list[int]]:
            asked.append(int(last.tokens[0]))
            return 0.0, [1 + len(asked) % 2] * len(shared)

    backend.costs = Costs()
    planner, slices = Planner(manager), []
    for num_own in (2, 3, 4, 20):
        batch = decoding(num_own)
        data = pack_hybrid(batch.tables, batch.num_tokens, page_size=16, query_lens=None, cost_model=None)
        work = backend.work(planner.plan(data, None, causal=True))
        slices.append(len(work.calls[0].kv_last_page_len))
    assert asked == [32, 64, 320]
    assert slices == [2, 2, 1, 2]


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
