"""Attention against row-by-row float64, plain and hybrid, for decode and append; and what it refuses.

Every slot that no sequence uses holds NaN, so that a read of one shows in any comparison.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqattn.attention import PagedAttention, torch_backend
from seqattn.cache import PagedKVCacheManager
from seqattn.hybrid import pack_hybrid
from seqattn.packed import FlashInferHybridData, FlashInferPackedData, HybridLevel
from tests.seqattn.truth import FOREST, Batch, batch_of, batches, dense_attention, fill, int32, pack


def cache_for(batch: Batch, seed: int = 0, num_heads: int = 2, head_dim: int = 4, **more: Any) -> PagedKVCacheManager:  # noqa: ANN401  the constructor's
    num_pages = 1 + max(int(table.max()) for table in batch.tables)
    arguments: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", **more}
    manager = PagedKVCacheManager(num_pages, batch.page_size, num_heads, head_dim, **arguments)
    fill(manager, batch, seed)
    return manager


def queries(batch: Batch, num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(sum(batch.query_lens), num_heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)


def levels(batch: Batch) -> FlashInferHybridData:
    return pack_hybrid(
        batch.tables, batch.num_tokens, page_size=batch.page_size, query_lens=batch.query_lens, cost_model=None
    )


def attend(
    attention: PagedAttention, batch: Batch, q: torch.Tensor, *, causal: bool = True, layer: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and lse from plain and from hybrid data."""
    results = []
    for packed, query_lens in ((pack(batch), batch.query_lens), (levels(batch), None)):
        attention.plan(packed, query_lens=query_lens, causal=causal)
        results.append(attention.run(q, layer=layer, return_lse=True))
    return results


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=False)


# -- right -------------------------------------------------------------------------------------------------------------


@given(batches(max_sequences=5, max_pages=4), st.sampled_from(["NHD", "HND"]), st.booleans(), st.integers(1, 3))
def test_plain_and_hybrid_attention_are_dense_attention(
    batch: Batch, kv_layout: str, causal: bool, heads_each: int
) -> None:
    manager = cache_for(batch, kv_layout=kv_layout)
    q = queries(batch, 2 * heads_each, 4)
    expected = dense_attention(manager, batch, q, causal=causal)
    for out, lse in attend(PagedAttention(manager, 2 * heads_each), batch, q, causal=causal):
        assert near(out, expected.out)
        assert near(lse, expected.lse)
        assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("query_lens", [[1] * 6, [4, 20, 1, 5, 3, 7]], ids=["decode", "append"])
@pytest.mark.parametrize("shuffle", [[0, 1, 2, 3, 4, 5], [5, 3, 0, 4, 2, 1]], ids=["grouped", "shuffled"])
def test_the_worked_forest(query_lens: list[int], shuffle: list[int]) -> None:
    num_tokens = [FOREST.num_tokens[i] for i in shuffle]
    batch = Batch(16, [FOREST.tables[i] for i in shuffle], num_tokens, [query_lens[i] for i in shuffle])
    manager = cache_for(batch, head_dim=16)
    q = queries(batch, 8, 16)
    expected = dense_attention(manager, batch, q)
    (plain, plain_lse), (hybrid, hybrid_lse) = attend(PagedAttention(manager, 8), batch, q)
    assert near(plain, expected.out)
    assert near(plain_lse, expected.lse)
    assert near(hybrid, plain)
    assert near(hybrid_lse, plain_lse)


SMALL = batch_of([[0, 1, 2], [0, 1, 3], [4]], [2, 4, 3], 4, [1, 3, 2])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=str,
)
def test_output_has_the_dtype_of_the_queries(dtype: torch.dtype, tolerance: float) -> None:
    manager = cache_for(SMALL, dtype=dtype)
    q = queries(SMALL, 4, 4, dtype)
    expected = dense_attention(manager, SMALL, q)
    for out, lse in attend(PagedAttention(manager, 4), SMALL, q):
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert near(out, expected.out, tolerance)
        assert near(lse, expected.lse, max(tolerance, 1e-5) if dtype != torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_a_cache_of_another_dtype_is_read_as_its_values(dtype: torch.dtype, kv_layout: str) -> None:
    stored = cache_for(SMALL, kv_layout=kv_layout)
    stored.key_cache.nan_to_num_(0)
    stored.value_cache.nan_to_num_(0)
    manager = PagedKVCacheManager(stored.num_pages, 4, 2, 4, dtype, "cpu", kv_layout)
    manager.key_cache.copy_(stored.key_cache.mul_(3).to(dtype))
    manager.value_cache.copy_(stored.value_cache.mul_(3).to(dtype))
    q = queries(SMALL, 2, 4)
    expected = dense_attention(manager, SMALL, q)
    for out, _ in attend(PagedAttention(manager, 2), SMALL, q):
        assert near(out, expected.out)


def test_each_layer_has_its_own_memory() -> None:
    manager = cache_for(SMALL, num_layers=3)
    q = queries(SMALL, 4, 4)
    for layer in range(3):
        expected = dense_attention(manager, SMALL, q, layer=layer)
        for out, _ in attend(PagedAttention(manager, 4), SMALL, q, layer=layer):
            assert near(out, expected.out)


def test_the_scale_and_the_soft_cap_of_the_scores() -> None:
    manager = cache_for(SMALL)
    q = 5 * queries(SMALL, 4, 4)
    attention = PagedAttention(manager, 4, sm_scale=0.7, logits_soft_cap=2.0)
    expected = dense_attention(manager, SMALL, q, sm_scale=0.7, soft_cap=lambda scores: 2.0 * torch.tanh(scores / 2.0))
    assert not near(expected.out, dense_attention(manager, SMALL, q, sm_scale=0.7).out)
    for out, lse in attend(attention, SMALL, q):
        assert near(out, expected.out)
        assert near(lse, expected.lse)


def test_query_heads_that_share_a_kv_head_are_neighbours() -> None:
    """A value cache that holds its head's number: query heads 0 1 2 read head 0, query heads 3 4 5 head 1."""
    manager = cache_for(SMALL)
    for head in range(2):
        manager.value_cache[:, :, head] = head
    for out, _ in attend(PagedAttention(manager, 6), SMALL, queries(SMALL, 6, 4)):
        assert near(out[0, :, 0], torch.tensor([0, 0, 0, 1, 1, 1]))


def test_work_is_cut_into_pieces_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([[0, 1, 2, 3], [0, 1, 4, 5, 6], [7]], [2, 4, 3], 4, [9, 14, 3])
    manager = cache_for(batch)
    q = queries(batch, 4, 4)
    expected = dense_attention(manager, batch, q)
    monkeypatch.setattr(torch_backend, "_MAX_ELEMENTS", 200)
    attention = PagedAttention(manager, 4)
    attention.plan(pack(batch), query_lens=batch.query_lens)
    pieces = attention._prepared[0]
    assert len(pieces) > 5
    assert max(piece.rows.shape[1] for piece in pieces) < 14
    for out, lse in attend(attention, batch, q):
        assert near(out, expected.out)
        assert near(lse, expected.lse)


def test_sequences_of_one_length_are_computed_together() -> None:
    batch = batch_of([[i, 20 + i] for i in range(20)], [3] * 20, 4, [1] * 20)
    attention = PagedAttention(cache_for(batch), 4)
    attention.plan(pack(batch))
    assert len(attention._prepared[0]) == 1


def test_the_pictures_of_the_plan_and_of_the_padded_items() -> None:
    """Three sequences in the order 2 0 1 with query lens 2 1 3, as drawn in seqattn/attention/plan.py."""
    lens = [3, 2, 1]
    own = HybridLevel(int32(0, 3, 5, 6), int32(0, 1, 2, 3), int32(0, 1, 2), int32(*lens))
    attention = PagedAttention(PagedKVCacheManager(8, 5, 1, 1, torch.float32, "cpu"), 1)
    attention.plan(FlashInferHybridData((own,), torch.tensor([2, 0, 1])))
    assert attention._rows is not None
    assert attention._rows.tolist() == [3, 4, 5, 0, 1, 2]
    attention = PagedAttention(PagedKVCacheManager(8, 4, 1, 1, torch.float32, "cpu"), 1)
    attention.plan(FlashInferPackedData(int32(7, 2, 5, 6, 1), int32(0, 3, 5), int32(2, 2)), query_lens=[3, 2])
    [[together]] = attention._prepared
    assert together.rows.tolist() == [[3, 4, 0], [0, 1, 2]]
    assert together.pages.tolist() == [[6, 1, 0], [7, 2, 5]]
    assert together.limits.tolist() == [[5, 6, 0], [8, 9, 10]]


# -- rows that see nothing, and batches without rows -------------------------------------------------------------------


def test_a_sequence_may_have_no_rows_in_a_plain_batch() -> None:
    batch = SMALL._replace(query_lens=[0, 3, 2])
    manager = cache_for(batch)
    q = queries(batch, 4, 4)
    attention = PagedAttention(manager, 4)
    attention.plan(pack(batch), query_lens=[0, 3, 2])
    assert near(attention.run(q), dense_attention(manager, batch, q).out)


def test_a_row_that_sees_nothing_has_output_zero() -> None:
    manager = PagedKVCacheManager(2, 4, 1, 2, torch.float32, "cpu")
    attention = PagedAttention(manager, 1)
    attention.plan(FlashInferPackedData(int32(), int32(0, 0), int32(0)), query_lens=[2], causal=False)
    out, lse = attention.run(torch.ones(2, 1, 2), return_lse=True)
    assert not out.any()
    assert (lse == -math.inf).all()


def test_a_batch_without_sequences_has_no_output() -> None:
    attention = PagedAttention(PagedKVCacheManager(2, 4, 1, 2, torch.float32, "cpu"), 3)
    attention.plan(FlashInferPackedData(int32(), int32(0), int32()))
    assert list(attention.run(torch.ones(0, 3, 2)).shape) == [0, 3, 2]


def test_merging_two_parts_of_nothing_is_nothing() -> None:
    nothing = torch.zeros(1, 1, 2), torch.full((1, 1), -math.inf)
    something = torch.ones(1, 1, 2), torch.zeros(1, 1)
    out, lse = torch_backend.merge_states(*nothing, *nothing)
    assert (out.tolist(), lse.tolist()) == ([[[0, 0]]], [[-math.inf]])
    for parts in ((nothing, something), (something, nothing)):
        out, lse = torch_backend.merge_states(*parts[0], *parts[1])
        assert (out.tolist(), lse.tolist()) == ([[[1, 1]]], [[0]])
    out, lse = torch_backend.merge_states(*something, 3 * something[0], something[1])
    assert (out.tolist(), lse.tolist()) == ([[[2, 2]]], [[1]])


def test_the_packed_tensors_may_be_reused_after_plan() -> None:
    manager = cache_for(SMALL)
    q = queries(SMALL, 4, 4)
    attention = PagedAttention(manager, 4)
    packed = pack(SMALL)
    attention.plan(packed, query_lens=SMALL.query_lens)
    for tensor in (packed.kv_page_indices, packed.kv_page_indptr, packed.kv_last_page_len):
        tensor.fill_(0)
    assert near(attention.run(q), dense_attention(manager, SMALL, q).out)


def test_no_gradient_is_kept() -> None:
    attention = PagedAttention(cache_for(SMALL), 4)
    attention.plan(pack(SMALL), query_lens=SMALL.query_lens)
    assert not attention.run(queries(SMALL, 4, 4).requires_grad_()).requires_grad
