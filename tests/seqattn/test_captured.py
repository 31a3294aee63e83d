"""Plans of a step that is a CUDA graph, without a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve

from seqattn.attention.calls import KernelCall
from seqattn.attention.captured import CapturedStep, _one_row_each
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


#: of a plan of eight sequences of one row in a graph, by position
PLAN = ("float", "int", "pinned", "qo", "kv", "lens", 8, 8, 32, 8, 16, True, 128, 128, False, -1, -1, True, 0, 0)


@pytest.mark.parametrize(
    "changed",
    [{6: 16}, {11: False}, {11: 1}, {17: 1}, {19: 2}, {19: False}, {19: 0.0}],
    ids=["more rows", "no graph", "a number for a graph", "a number for a flag", "more promised", "a flag", "a float"],
)
def test_one_row_is_promised_where_each_sequence_has_one_and_nothing_is(changed: dict[int, Any]) -> None:
    assert _one_row_each(PLAN) == (*PLAN[:19], 1)
    other = tuple(changed.get(i, given) for i, given in enumerate(PLAN))
    for unknown in (other, PLAN[:19], (*PLAN, 0)):
        assert _one_row_each(unknown) is unknown


class Flashinfer:
    """Stands for a wrapper whose kernels are loaded by its first plan, and keeps what they return."""

    def __init__(self) -> None:
        self.promised: list[int] = []
        self._plan_info: object = None

    def plan(self, indptr: torch.Tensor, lengths: torch.Tensor) -> None:
        if "_cached_module" not in self.__dict__:
            self._cached_module = SimpleNamespace(plan=self.kernel)
        given = [{4: indptr, 5: lengths}.get(i, argument) for i, argument in enumerate(PLAN)]
        self._plan_info = self._cached_module.plan(*given)

    def kernel(self, *arguments: Any) -> int:  # noqa: ANN401  anything
        self.promised.append(arguments[-1])
        return len(self.promised)


def test_what_is_captured_and_all_later_plans_are_promised_one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    plans, made = FixedPlans(), Flashinfer()
    (block,), (wrapper,) = plans.step._blocks, plans.step._wrappers
    wrapper.made = made
    monkeypatch.setattr("seqattn.attention.captured._Block", lambda *_: block)
    form = SimpleNamespace(num_groups=2, num_pages=64, tables=b"")
    step, call = plans.step, call_of(100, 40)
    step.__dict__.update(form=SimpleNamespace(calls=(form,)), _wrappers=[], _blocks=[], _plans=[], _prepared=None)
    backend = step._backend
    backend.device, backend.sets = None, [SimpleNamespace(fixed=lambda *_: wrapper, options=lambda _: {})]
    backend.plan_call = lambda _, __, tables, seq_lens: made.plan(tables[1], seq_lens)
    step._make(SimpleNamespace(calls=(call,), lane=lambda _: 0))
    step._plan(call, 0)
    assert (made.promised, made._plan_info) == ([0, 1], 2), "the grid that is captured is the second plan's"
    step._prepared = object()
    for n in (101, 102):
        step._plan(call_of(n, 40), 0)
    assert made.promised == [0, 1, 1, 1]
    assert made._plan_info == 2
