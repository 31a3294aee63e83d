"""A planner that has seen batches, and the work of the next one, against those that begin anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from attrs import fields

from seqattn.attention.calls import Choice, KernelCall, Work, is_next, next_work, work_of
from seqattn.attention.plan import BatchPlan, LevelPlan, Planner, plan_batch
from seqattn.cache import PagedKVCacheManager
from seqattn.descriptor import CacheDescriptor
from seqattn.errors import LengthError, PageError
from seqattn.packed import FlashInferHybridData

PAGE_SIZE = 4


def made(num_sequences: int, prompts: Sequence[str] = ("a", "b")) -> tuple[PagedKVCacheManager, CacheDescriptor]:
    """Sequences that continue one of two prompts, alternately."""
    manager = PagedKVCacheManager(200, PAGE_SIZE, 2, 8, torch.float32, "cpu")
    descriptor = CacheDescriptor(manager)
    descriptor.allocate(list(prompts), [21, 14])
    for i in range(num_sequences):
        descriptor.fork(prompts[i % 2], i)
        descriptor.allocate([i], [1 + i])
    return manager, descriptor


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (BatchPlan, LevelPlan, KernelCall, Work)):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(type(a)))
    return a == b


@pytest.mark.parametrize("hybrid", [False, True], ids=["plain", "hybrid"])
def test_batches_that_follow_one_another_are_planned_as_if_they_were_the_first(hybrid: bool) -> None:
    manager, descriptor = made(7)
    planner, ids = Planner(manager), list(range(7))
    works: list[tuple[BatchPlan, Work]] = []
    num_kept = 0
    for number in range(30):
        if number % 10 == 9:
            descriptor.release([ids.pop(0)])
        descriptor.allocate_decoding(ids)
        pack = descriptor.pack_hybrid_for_flashinfer if hybrid else descriptor.pack_for_flashinfer
        data = pack(ids)
        plan = planner.plan(data, None, causal=True)
        assert same(plan, plan_batch(manager, data, None, causal=True))
        choices = [Choice("fa3", 2)] * (len(plan.levels) - 1) + [Choice("decode")]
        work = work_of(plan, choices, 2, PAGE_SIZE)
        if works and is_next(works[-1][0], plan):
            num_kept += 1
            assert same(next_work(works[-1][1], plan), work)
        works.append((plan, work))
    assert num_kept == 26


def test_packed_tensors_may_be_rewritten_after_a_plan() -> None:
    manager, descriptor = made(4)
    planner = Planner(manager)
    data = descriptor.pack_hybrid_for_flashinfer(range(4))
    first = planner.plan(data, None, causal=True)
    expected = plan_batch(manager, data, None, causal=True).levels[0].kv_page_indices.copy()
    data.levels[0].kv_page_indices.fill_(7)
    assert first.levels[0].kv_page_indices.tolist() == expected.tolist()
    second = planner.plan(data, None, causal=True)
    assert set(second.levels[0].kv_page_indices.tolist()) == {7}


def test_a_batch_that_is_refused_leaves_what_was_kept() -> None:
    manager, descriptor = made(4)
    planner = Planner(manager)
    data = descriptor.pack_hybrid_for_flashinfer(range(4))
    first = planner.plan(data, None, causal=True)
    top, own = data.levels[0], data.levels[-1]
    pages, last = own.kv_page_indices.clone(), own.kv_last_page_len.clone()
    own.kv_page_indices[0] = 200
    with pytest.raises(PageError, match="page 200"):
        planner.plan(data, None, causal=True)
    own.kv_page_indices[0] = -1
    with pytest.raises(LengthError, match="page numbers start at 0"):
        planner.plan(data, None, causal=True)
    own.kv_page_indices.copy_(pages)
    own.kv_last_page_len[0] = PAGE_SIZE + 1
    with pytest.raises(LengthError):
        planner.plan(FlashInferHybridData.trusted((top, own), data.order), None, causal=True)
    own.kv_last_page_len.copy_(last)
    assert all(
        a is b for a, b in zip(first.levels[:-1], planner.plan(data, None, causal=True).levels[:-1], strict=True)
    )


def test_query_lens_are_compared_with_those_of_the_pack_in_every_plan() -> None:
    """Also where the rows of a batch are known from the plan before."""
    manager, descriptor = made(4)
    planner = Planner(manager)
    data = descriptor.pack_hybrid_for_flashinfer(range(4))
    first = planner.plan(data, None, causal=True)
    assert first.rows is not None
    for wrong in ([1, 1, 1, 2], [2, 0, 1, 1]):
        with pytest.raises(LengthError, match="differ from those it was packed with"):
            planner.plan(data, wrong, causal=True)
    with pytest.raises(LengthError, match="one integer for each of 4 sequences"):
        planner.plan(data, [1, 1, 1], causal=True)
    assert planner.plan(data, None, causal=True).rows is first.rows, "a refusal leaves what was kept"
    assert same(planner.plan(data, [1, 1, 1, 1], causal=True), first)
