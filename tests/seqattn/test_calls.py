"""The calls of a batch: computed one by one and merged by their codes, they are dense attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqattn.attention.calls import Choice, KernelCall, Work, is_next, next_work, work_of
from seqattn.attention.choice import choose
from seqattn.attention.flashinfer_backend import FlashInferBackend
from seqattn.attention.plan import BatchPlan, Planner, plan_batch
from seqattn.attention.torch_backend import merge_states
from seqattn.attention.views import Spans
from seqattn.cache import PagedKVCacheManager
from seqattn.device import Device, Groups, Heads
from seqattn.hybrid import pack_hybrid
from seqattn.packed import FlashInferHybridData, HybridLevel
from tests.seqattn.truth import FOREST, Batch, batch_of, batches, dense_attention, fill, int32, pack

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
    """Computes a batch call by call; `work` may be one with rows of padding behind the batch's, as in `larger`.

    No call has a group without rows or pages, but for padding; a last one that decodes has the caller's queries as they
    are.
    """
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
        if larger is batch:
            assert (np.diff(call.qo_indptr) > 0).all()
            assert (np.diff(call.kv_page_indptr) > 0).all()
        assert call.kernel != "decode" or first is None or call is not work.calls[-1]
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


@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]], ids=["the caller's order", "another order"])
def test_groups_without_rows_or_pages_are_left_out(kernel: Literal["fa2", "fa3"], order: list[int]) -> None:
    """Two sequences on pages 0 and 1, one that shares none, and one without rows on page 2."""
    shared = HybridLevel(int32(0, 3, 4, 4), int32(0, 2, 2, 3), int32(0, 1, 2), int32(4, 0, 4))
    own = HybridLevel(int32(0, 1, 3, 4, 4), int32(0, 1, 2, 3, 4), int32(3, 4, 5, 6), int32(4, 3, 2, 1))
    tables, last, rows = [[0, 1, 3], [0, 1, 4], [5], [2, 6]], [4, 3, 2, 1], [1, 2, 1, 0]
    places = np.argsort(order).tolist()
    batch = batch_of([tables[i] for i in places], [last[i] for i in places], 4, [rows[i] for i in places])
    manager = PagedKVCacheManager(7, 4, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    fill(manager, batch, 0)
    plan = plan_batch(manager, FlashInferHybridData((shared, own), torch.tensor(order)), None, causal=True)
    choices = [Choice(kernel), Choice("fa2")]
    check(plan, choices, manager, batch, True)
    upper, lower = work_of(plan, choices, HEADS_EACH, 4).calls
    assert (len(upper.kv_last_page_len), upper.kv_page_indices.tolist()) == (1, [0, 1])
    assert (len(lower.kv_last_page_len), lower.kv_page_indices.tolist()) == (3, [3, 4, 5])


def test_the_lengths_of_a_call_are_those_of_its_lists() -> None:
    call = work_of_own(2, 1, 3)
    assert call.lens(16).tolist() == [32, 16, 48]
    assert call.lens(16).dtype == np.int32


def work_of_own(*num_own: int) -> KernelCall:
    """The last call of sequences with so many pages of their own."""
    manager = PagedKVCacheManager(64, 16, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    plan = plan_of(decoding(*num_own), manager)
    return work_of(plan, [Choice("fa2"), Choice("decode")], HEADS_EACH, 16).calls[-1]


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
    own = [[1100 + i] for i in range(num_sequences)]
    batch = batch_of([[*prefix, *pages] for pages in own], [last or 7] * num_sequences, page_size, [1] * num_sequences)
    manager = PagedKVCacheManager(1100 + num_sequences, page_size, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
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


def test_the_longest_slice_decides_whether_a_list_is_read_as_one_array() -> None:
    """1,023 tokens in two slices are 511 and 512, from which on an array is faster."""
    assert in_line(*range(1022), page_size=1, last=1).calls[0].span is None
    call = in_line(*range(1023), page_size=1, last=1).calls[0]
    assert call.span == (0, 1023)
    assert call.kv_page_indptr.tolist() == [0, 511, 1023]


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


def decoding(*num_own: int) -> Batch:
    """Sequences on 20 pages, with so many pages of their own."""
    ends = np.cumsum((20, *num_own)).tolist()
    tables = [[*range(20), *range(begin, end)] for begin, end in pairwise(ends)]
    return batch_of(tables, [16] * len(num_own), 16, [1] * len(num_own))


def test_a_step_that_follows_needs_nothing_of_the_tensors_of_the_step_before() -> None:
    """Packed tensors may be written anew after a plan."""
    manager = PagedKVCacheManager(64, 16, 8, 4, torch.float32, "cpu")
    planner, choices = Planner(manager), [Choice("fa2"), Choice("decode")]
    data = [
        pack_hybrid(b.tables, b.num_tokens, page_size=16, query_lens=None, cost_model=None)
        for b in [decoding(2, 2, 2, 2)] * 2
    ]
    first = planner.plan(data[0], None, causal=True)
    work = work_of(first, choices, 4, 16)
    for level in data[0].levels:
        level.qo_indptr.zero_()
    second = planner.plan(data[1], None, causal=True)
    assert is_next(first, second)
    assert next_work(work, second).calls[-1].qo_indptr.tolist() == [0, 1, 2, 3, 4]


def test_ways_are_chosen_anew_when_sequences_have_grown_or_one_is_much_longer() -> None:
    manager = PagedKVCacheManager(200, 16, 8, 128, torch.bfloat16, "cpu")
    backend: Any = object.__new__(FlashInferBackend)  # without what needs a device
    backend.manager, backend.heads_each, backend.heads = manager, 4, Heads()
    backend._known, backend._last_slices, backend.spans = None, (b"", []), Spans(manager)
    asked = []

    class Costs:
        has_fa3 = True

        def best(self, shared: Sequence[Groups], _: Heads, last: Groups) -> tuple[float, list[int]]:
            asked.append(int(last.tokens.max()))
            return 0.0, [1 + len(asked) % 2] * len(shared)

    backend.costs = Costs()
    planner, slices = Planner(manager), []
    for num_own in ((2, 2, 2, 2), (3, 3, 3, 3), (4, 4, 4, 4), (20, 20, 20, 20), (70, 4, 3, 3), (71, 3, 3, 3)):
        batch = decoding(*num_own)
        data = pack_hybrid(batch.tables, batch.num_tokens, page_size=16, query_lens=None, cost_model=None)
        work = backend.work(planner.plan(data, None, causal=True))
        slices.append(len(work.calls[0].kv_last_page_len))
    assert asked == [32, 64, 320, 1120]
    assert slices == [2, 2, 1, 2, 1, 1]
