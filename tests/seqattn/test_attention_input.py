"""What `PagedAttention` refuses; the plan before stays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from seqattn.attention import PagedAttention, flashinfer_backend
from seqattn.cache import PagedKVCacheManager
from seqattn.device import Device, Heads
from seqattn.errors import BadValueError, LengthError, MissingExtraError, PageError, SeqAttnError, TensorError
from seqattn.hybrid import pack_hybrid
from seqattn.packed import FlashInferHybridData, FlashInferPackedData, HybridLevel
from seqattn.pages import PageAllocator
from tests.seqattn.truth import Batch, batch_of, int32, pack

SMALL = batch_of([[0, 1, 2], [0, 1, 3], [4]], [2, 4, 3], 4, [1, 3, 2])
QUERIES = torch.linspace(-1, 1, 48).view(6, 2, 4)


def levels(batch: Batch) -> FlashInferHybridData:
    return pack_hybrid(
        batch.tables, batch.num_tokens, page_size=batch.page_size, query_lens=batch.query_lens, cost_model=None
    )


MANAGER = PagedKVCacheManager(8, 4, 2, 4, torch.float32, "cpu", num_layers=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_qo_heads": 3}, BadValueError, "num_qo_heads 3 is no multiple of the cache's 2 heads"),
        ({"manager": PageAllocator(8, 4)}, TensorError, "the KV memory of a PagedKVCacheManager, not PageAllocator"),
        ({"num_qo_heads": 0}, BadValueError, "num_qo_heads must be an integer of at least 1, not 0"),
        ({"backend": "triton"}, BadValueError, "'triton' is not available in this version: use .* 'torch'"),
        ({"sm_scale": 0}, BadValueError, "sm_scale must be a positive number, not 0"),
        ({"sm_scale": math.nan}, BadValueError, "sm_scale must be a positive number, not nan"),
        ({"sm_scale": np.float32(-1)}, BadValueError, "sm_scale must be a positive number, not"),
        ({"sm_scale": 10**400}, BadValueError, "sm_scale must be a positive number, not 1000"),
        ({"sm_scale": torch.ones(1)}, BadValueError, "sm_scale must be a positive number, not tensor"),
        ({"backend": ["torch"]}, BadValueError, r"backend \['torch'\] is not available"),
        ({"logits_soft_cap": -1.0}, BadValueError, r"logits_soft_cap must be a positive number, not -1\.0"),
        ({"logits_soft_cap": True}, BadValueError, "logits_soft_cap must be a positive number, not True"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PagedAttention(**{"manager": MANAGER, "num_qo_heads": 4, **options})


def test_a_scale_may_be_any_real_number() -> None:
    scales = [PagedAttention(MANAGER, 4, sm_scale=scale)._impl.sm_scale for scale in (1, 0.5, np.float32(0.5))]  # type: ignore[attr-defined, arg-type]
    assert scales == [1.0, 0.5, 0.5]


def test_auto_is_a_backend_by_name() -> None:
    assert PagedAttention(MANAGER, 2).backend == PagedAttention(MANAGER, 2, backend="torch").backend == "torch"


def test_the_kernels_of_flashinfer_need_a_cache_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtraError, match=r"seqattn\[flashinfer\]"):
        PagedAttention(MANAGER, 4, backend="flashinfer")
    monkeypatch.setattr(flashinfer_backend, "find_spec", lambda name: object())
    with pytest.raises(TensorError, match="the cache is on cpu, not on CUDA; use backend='torch'"):
        PagedAttention(MANAGER, 4, backend="flashinfer")


def test_the_cost_model_has_the_heads_of_the_attention() -> None:
    model = PagedAttention(MANAGER, 6).cost_model
    assert model.heads == Heads(6, 2, 4, 4)
    assert model.kv_bytes_per_token == 2 * 2 * 4 * 4


def test_graphs_are_weighed_without_the_kernel_for_short_lists() -> None:
    attention: Any = PagedAttention(MANAGER, 6)
    for costs in (None, Device(), Device(level_us=9.0)):  # None: nobody knows what its kernels cost
        attention._impl.costs = costs
        model = attention.graph_cost_model
        assert attention.cost_model.device == (costs or Device())
        assert model.device == evolve(costs or Device(), has_short=False)
        assert model.heads == attention.cost_model.heads
        assert attention.graph_cost_model is model, "it remembers what was chosen"
        assert attention.cost_model is attention.cost_model is not model


def test_run_needs_a_plan() -> None:
    with pytest.raises(SeqAttnError, match="call plan"):
        PagedAttention(MANAGER, 2).run(torch.zeros(1, 2, 4))


def short_level(*qo_indptr: int) -> HybridLevel:
    return HybridLevel(int32(*qo_indptr), int32(0, 1), int32(0), int32(4))


OWN = HybridLevel(int32(0, 1, 3), int32(0, 1, 2), int32(1, 2), int32(4, 4))


@pytest.mark.parametrize(
    ("packed", "query_lens", "error", "message"),
    [
        (pack(SMALL), [1, 1], LengthError, r"query_lens must be one integer for each of 3 sequences, not \[1, 1\]"),
        (pack(SMALL), [1, 1, 1.0], LengthError, "query_lens must be one integer for each of 3 sequences"),
        (pack(SMALL), [[1], [1, 1], 1], LengthError, "query_lens must be one integer for each of 3 sequences"),
        (pack(SMALL), np.ones(3, np.uint64), LengthError, "query_lens must be one integer for each of 3 sequences"),
        (pack(SMALL), [1, -2, 1], LengthError, "query_lens holds -2: a sequence has 0 rows or more"),
        (pack(SMALL), [1, 1, 4], LengthError, "4 query rows for 3 tokens in causal attention"),
        (FlashInferPackedData(int32(1), int32(0, 1), int32(5)), None, LengthError, r"is 5 .* in \[1, 4\]"),
        (FlashInferPackedData(int32(8), int32(0, 1), int32(1)), None, PageError, r"page 8 is not in \[0, 8\)"),
        (FlashInferPackedData(int32(), int32(0, 0), int32(0)), None, LengthError, "1 query rows for 0 tokens"),
        (levels(SMALL), [1, 3, 1], LengthError, r"\[1, 3, 1\] differ from those .* packed with: \[1 3 2\]"),
        (FlashInferHybridData((short_level(0, 2), OWN), torch.arange(2)), None, LengthError, r"cover \[2, 3\] rows"),
        ([[0, 1]], None, TensorError, "plan needs FlashInferPackedData or FlashInferHybridData, not list"),
    ],
)
def test_a_bad_plan_is_refused_and_the_plan_before_stays(
    packed: Any,  # noqa: ANN401  anything may be passed
    query_lens: Any,  # noqa: ANN401  as above
    error: type[Exception],
    message: str,
) -> None:
    attention = PagedAttention(MANAGER, 2)
    attention.plan(pack(SMALL), query_lens=[1, 3, 2])
    before = attention.run(QUERIES)
    with pytest.raises(error, match=message):
        attention.plan(packed, query_lens=query_lens)
    assert torch.equal(attention.run(QUERIES), before)


def test_hybrid_data_takes_the_query_lens_it_was_packed_with() -> None:
    attention = PagedAttention(MANAGER, 2)
    attention.plan(levels(SMALL), query_lens=SMALL.query_lens)
    assert list(attention.run(QUERIES).shape) == [6, 2, 4]


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (torch.zeros(5, 2, 4), r"q has shape \[5, 2, 4\] but the plan needs \[6, 2, 4\]"),
        (torch.zeros(6, 4, 4), r"q has shape \[6, 4, 4\]"),
        (torch.zeros(6, 2, 8), r"q has shape \[6, 2, 8\]"),
        (torch.zeros(6, 8), r"q has shape \[6, 8\]"),
        (torch.zeros(6, 2, 4, dtype=torch.int64), r"q must be a float16, .* tensor, not torch\.int64"),
        (torch.zeros(6, 2, 4).tolist(), "not list"),
        (torch.zeros(6, 2, 4, device="meta"), "q is on meta but the cache on cpu"),
    ],
)
def test_queries_that_do_not_fit_the_plan_are_refused(q: Any, message: str) -> None:  # noqa: ANN401  anything may be passed
    attention = PagedAttention(MANAGER, 2)
    attention.plan(pack(SMALL), query_lens=[1, 3, 2])
    with pytest.raises(TensorError, match=message):
        attention.run(q)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    attention = PagedAttention(MANAGER, 2)
    attention.plan(pack(SMALL), query_lens=[1, 3, 2])
    with pytest.raises(LengthError, match=r"layer 2 is not in \[0, 2\)"):
        attention.run(torch.zeros(6, 2, 4), layer=2)
