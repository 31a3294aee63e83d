"""A wrapper's bound run: the same kernel with the same arguments, whatever a version of flashinfer passes along."""

from __future__ import annotations

from itertools import product
from threading import Thread
from types import SimpleNamespace
from typing import Any

import torch

from seqattn.attention.bound import BoundPlan, BoundRun


class Wrapper:
    """Passes on to a kernel what a wrapper of flashinfer does: buffers, a plan, five tensors, more."""

    def __init__(self, *, by_name: bool = False, twice: bool = False, copies: bool = False, two: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.num_runs = 0
        self.how = (by_name, twice, copies)
        self.takes_two = two
        self._cached_module: Any = SimpleNamespace(run=self.kernel, scale=2)

    def kernel(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401  anything
        self.calls.append((*arguments, *named.values()))
        arguments[5].fill_(float(arguments[1].sum()))

    def run(
        self,
        q: torch.Tensor,
        *caches: Any,  # noqa: ANN401  a pair, or two
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> None:
        self.num_runs += 1
        caches = caches if self.takes_two else caches[0]
        assert len(caches) == 2
        by_name, twice, copies = self.how
        assert return_lse == (lse is not None)
        q = q.clone() if copies else q
        named = {"scale": self._cached_module.scale} if by_name else {}
        for _ in range(1 + twice):
            self._cached_module.run("plan", q, *caches, 7, out, lse, **named)


def tensors(seed: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    q, keys, values = (torch.full((2,), float(seed + i)) for i in range(3))
    return q, (keys, values), torch.zeros(2), torch.zeros(2)


def run(wrapper: Wrapper, num_layers: int = 4, *, with_lse: bool = True) -> None:
    bound, module = BoundRun(wrapper, takes_two=wrapper.takes_two), wrapper._cached_module
    for layer in range(num_layers):
        q, caches, out, lse = tensors(layer)
        bound(q, caches, out, lse if with_lse else None)
        assert out.tolist() == [2.0 * layer] * 2
        wanted = ("plan", q, *caches, 7, out, lse if with_lse else None)
        assert all(a is b or a == b for a, b in zip(wanted[2:], wrapper.calls[-1][2:], strict=False))
        assert wrapper._cached_module is module


def test_only_the_first_layer_goes_through_the_wrapper() -> None:
    for with_lse, two in product((False, True), repeat=2):
        wrapper = Wrapper(two=two)
        run(wrapper, with_lse=with_lse)
        assert wrapper.num_runs == 1
        assert len(wrapper.calls) == 4


def test_a_wrapper_that_calls_its_kernel_in_another_way_is_run_each_time() -> None:
    for how in ({"by_name": True}, {"twice": True}, {"copies": True}):
        wrapper = Wrapper(**how)
        run(wrapper)
        assert wrapper.num_runs == 4


def test_a_wrapper_without_a_module_is_run_each_time() -> None:
    class Plain:
        num_runs = 0

        def run(self, q: torch.Tensor, caches: object, *, out: torch.Tensor) -> None:
            self.num_runs += 1
            out.copy_(q)

    plain = Plain()
    bound = BoundRun(plain)
    for layer in range(3):
        q, caches, out, _ = tensors(layer)
        bound(q, caches, out, None)
        assert torch.equal(out, q)
    assert plain.num_runs == 3


def test_nothing_is_kept_alive_between_layers() -> None:
    wrapper = Wrapper()
    bound = BoundRun(wrapper)
    q, caches, out, lse = tensors(0)
    bound(q, caches, out, lse)
    assert not any(isinstance(argument, torch.Tensor) for argument in bound._arguments)


class Planned:
    """A wrapper whose plan comes to one call of its module, with the arrays that it is given somewhere in it."""

    def __init__(self, *, copies: bool = False, with_lengths: bool = True, counts: bool = False) -> None:
        self.counts = counts
        self.calls: list[tuple[Any, ...]] = []
        self.num_plans = 0
        self.how = (copies, with_lengths)
        self._cached_module: Any = SimpleNamespace(plan=lambda *arguments: self.calls.append(arguments))

    def plan(self, indptr: torch.Tensor, lengths: torch.Tensor) -> None:
        self.num_plans += 1
        copies, with_lengths = self.how
        indptr = indptr.clone() if copies else indptr
        lengths = lengths.int() if self.counts else lengths
        self._cached_module.plan("workspace", indptr, *([lengths] if with_lengths else []), 7)


def _text(given: object) -> str:
    return str(given.tolist() if isinstance(given, torch.Tensor) else given)


def plan(wrapper: Planned) -> None:
    bound, module = BoundPlan(wrapper), wrapper._cached_module.plan
    for step in range(4):
        indptr, lengths = torch.full((3,), step), torch.full((2,), 10 * step)
        bound(lambda: wrapper.plan(indptr, lengths), indptr, lengths)  # noqa: B023  called at once
        wanted = ("workspace", indptr, *([lengths] if wrapper.how[1] else []), 7)
        assert len(wrapper.calls) == step + 1
        assert [_text(given) for given in wrapper.calls[-1]] == [_text(given) for given in wanted]
        assert wrapper._cached_module.plan is module


def test_only_the_first_plan_goes_through_the_wrapper() -> None:
    for with_lengths in (True, False):
        wrapper = Planned(with_lengths=with_lengths)
        plan(wrapper)
        assert wrapper.num_plans == 1


def test_a_plan_that_copies_its_arrays_is_made_by_the_wrapper_each_time() -> None:
    wrapper = Planned(copies=True)
    plan(wrapper)
    assert wrapper.num_plans == 4


def test_a_plan_that_finds_the_lengths_by_itself_is_made_by_the_wrapper_each_time() -> None:
    wrapper = Planned(counts=True)
    plan(wrapper)
    assert wrapper.num_plans == 4


def test_a_plan_of_another_thread_is_not_taken_for_its_own() -> None:
    wrapper = Planned()
    bound, module = BoundPlan(wrapper, lambda arguments: (*arguments[:-1], 8)), wrapper._cached_module

    def plan_beside(indptr: torch.Tensor, lengths: torch.Tensor) -> None:
        other = Thread(target=lambda: module.plan("other"))
        other.start()
        other.join()
        wrapper.plan(indptr, lengths)

    for step in range(3):
        indptr, lengths = torch.full((3,), step), torch.full((2,), 10 * step)
        bound(lambda: plan_beside(indptr, lengths), indptr, lengths)  # noqa: B023  called at once
    assert wrapper.num_plans == 1
    assert bound.is_repeated
    assert [arguments[-1] for arguments in wrapper.calls] == ["other", 8, 8, 8]


def test_what_is_changed_in_a_plan_is_changed_in_every_one_without_the_wrapper() -> None:
    wrapper = Planned()
    bound = BoundPlan(wrapper, lambda arguments: (*arguments[:-1], arguments[-1] + 1))
    module = wrapper._cached_module.plan
    indptr, lengths = torch.zeros(3), torch.ones(2)
    for _ in range(3):
        bound(lambda: wrapper.plan(indptr, lengths), indptr, lengths)
    assert [arguments[-1] for arguments in wrapper.calls] == [8, 8, 8]
    assert (wrapper.num_plans, wrapper._cached_module.plan) == (1, module)


def test_if_plans_are_left_to_the_wrapper_none_that_is_used_is_changed() -> None:
    wrapper = Planned(copies=True)
    bound = BoundPlan(wrapper, lambda arguments: (*arguments[:-1], arguments[-1] + 1))
    indptr, lengths = torch.zeros(3), torch.ones(2)
    for last in (2, 3, 4):
        bound(lambda: wrapper.plan(indptr, lengths), indptr, lengths)
        assert len(wrapper.calls) == last
        assert wrapper.calls[-1][-1] == 7
