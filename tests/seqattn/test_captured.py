"""Plans of a step that is a CUDA graph, without a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from attrs import evolve

from seqattn.attention.calls import KernelCall
from seqattn.attention.captured import CapturedStep
from seqattn.attention.wrapper import Wrapper
from tests.seqattn.test_replans import call_of


class FixedPlans:
    """Stands for what `CapturedStep` plans a call with: memory in place, a wrapper, and a plan that is repeated."""

    def __init__(self) -> None:
        self.planned: list[list[int]] = []
        self.wrapper = Wrapper(object(), 0, 0)
        block: Any = SimpleNamespace(sizes={"kv_page_indices": 64}, device={"kv_page_indices": []})
        block.write, block.send = lambda *_: None, lambda *_: None
        block.written = lambda _, count: torch.zeros(count, dtype=torch.int32)
        kept = {"_wrappers": [self.wrapper], "_blocks": [block], "_plans": [self.plan], "_prepared": object()}
        self.step: Any = object.__new__(CapturedStep)
        self.step.__dict__.update(kept, _backend=SimpleNamespace(manager=SimpleNamespace(page_size=16)))

    def plan(self, _: object, indptr: torch.Tensor, lengths: torch.Tensor) -> None:
        assert not self.wrapper.is_planned_for(self.call), "until it is made nothing is planned"
        self.planned.append(lengths.tolist())

    def wants(self, call: KernelCall) -> None:
        self.call = call
        if not self.wrapper.is_planned_for(call):
            self.step._plan(call, 0)


def test_a_level_above_the_last_is_planned_in_a_graph_when_its_lists_change() -> None:
    """Long lists of two batches that take turns."""
    plans = FixedPlans()
    first, other = (evolve(call_of(n, 40), is_last=False) for n in (100, 200))
    for call in (first, first, evolve(first), other, other, first):
        plans.wants(call)
    assert plans.planned == [[100, 40], [200, 40], [100, 40]]
    last = call_of(300, 40)
    for _ in range(2):
        plans.wants(last)
    assert plans.planned[3:] == [[300, 40], [300, 40]], "a last level that decodes has other lists with every step"


def test_the_first_plan_of_a_graph_is_made_as_all_that_follow() -> None:
    """The wrapper loads its kernels with a plan of its own; the grid that is captured is the next one's."""
    plans = FixedPlans()
    by_wrapper: list[list[int]] = []
    plans.step.__dict__.update(_prepared=None)
    plans.step._backend.sets = [SimpleNamespace(options=lambda _: {})]
    plans.step._backend.plan_call = lambda *_, seq_lens: by_wrapper.append(seq_lens.tolist())
    call = call_of(100, 40)
    plans.wants(call)
    assert by_wrapper == plans.planned == [[100, 40]]
