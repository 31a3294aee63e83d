"""Plans of a wrapper that decodes: repeated for batches of one size, made by the wrapper for all others."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from seqattn.attention.bound import BoundRun
from seqattn.attention.calls import KernelCall
from seqattn.attention.wrapper import Wrapper
from seqattn.attention.wrapper_set import WrapperSet
from seqattn.cache import PagedKVCacheManager

PAGE_SIZE = 16


class Stand:
    """Plans and runs as a decode wrapper of flashinfer does: its kernels are loaded with its first plan."""

    def __init__(self, *, copies_pages: bool = False, doubles: bool = False, keeps_last: bool = True) -> None:
        self.num_plans = self.num_runs = 0
        self.scheduled: list[list[list[int]]] = []
        self.ran: list[list[list[int]]] = []
        self.fails = False
        self._how = (copies_pages, doubles)
        self._keeps_last = keeps_last
        self.workspaces: list[Any] = []
        self._cached_module: Any = None
        self._qo_indptr_buf = self._paged_kv_indptr_buf = self._paged_kv_indices_buf = torch.zeros(0)
        self._paged_kv_last_page_len_buf, self._plan_info = torch.zeros(0), None

    def plan(self, indptr: torch.Tensor, pages: torch.Tensor, last: torch.Tensor, seq_lens: torch.Tensor) -> None:
        self.num_plans += 1
        self._cached_module = self._cached_module or SimpleNamespace(plan=self._schedule, run=self._kernel)
        self._qo_indptr_buf = torch.arange(len(indptr))
        self._paged_kv_indptr_buf, self._paged_kv_last_page_len_buf = indptr.clone(), last.clone()
        self._paged_kv_indices_buf = pages.clone() if self._how[0] else pages
        if not self._keeps_last:
            self._last, self._paged_kv_last_page_len_buf = self._paged_kv_last_page_len_buf, None  # type: ignore[assignment]
        self._plan_info = self._cached_module.plan("workspace", indptr, seq_lens, len(last))

    def _schedule(self, _: str, indptr: torch.Tensor, lengths: torch.Tensor, batch_size: int) -> Any:  # noqa: ANN401  opaque
        if self.fails:
            raise RuntimeError("no memory")
        assert len(indptr) == batch_size + 1 == len(lengths) + 1
        self.scheduled.append([indptr.tolist(), lengths.tolist()])
        return SimpleNamespace(lengths=lengths.tolist())

    def run(
        self,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        *,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> None:
        self.num_runs += 1
        assert return_lse == (lse is not None)
        last = self._paged_kv_last_page_len_buf if self._keeps_last else self._last
        tables = (self._paged_kv_indptr_buf, self._paged_kv_indices_buf, last)
        more = (self._plan_info,) if self._how[1] else ()
        self._cached_module.run(self._plan_info, *more, q, *caches, self._qo_indptr_buf, *tables, out, lse)

    def _kernel(self, info: Any, *arguments: Any) -> None:  # noqa: ANN401  anything
        *_, qo_indptr, indptr, pages, last, out, _lse = arguments
        assert len(qo_indptr) == len(indptr) == len(last) + 1
        self.ran.append([info.lengths, indptr.tolist(), pages.tolist(), last.tolist()])
        out.fill_(1.0)

    def reset_workspace_buffer(self, *workspaces: Any) -> None:  # noqa: ANN401  tensors
        self.workspaces = list(workspaces)


def call_of(*num_tokens: int, seed: int = 0) -> KernelCall:
    """A decoding call of sequences on random pages."""
    lens = np.array(num_tokens)
    indptr = np.concatenate(([0], np.cumsum(-(-lens // PAGE_SIZE)))).astype(np.int32)
    pages = np.random.default_rng(seed).permutation(int(indptr[-1])).astype(np.int32)
    last = ((lens - 1) % PAGE_SIZE + 1).astype(np.int32)
    qo_indptr = np.arange(len(lens) + 1, dtype=np.int32)
    return KernelCall("decode", qo_indptr, indptr, pages, last, True, False, None, 0, len(lens))


def plan(wrapper: Wrapper, call: KernelCall) -> None:
    """As the backend does."""

    def by_wrapper(tables: tuple[torch.Tensor, ...], *, seq_lens: torch.Tensor) -> None:
        wrapper.made.plan(*tables[1:], seq_lens=seq_lens)
        wrapper.done(call)

    on_device, on_cpu = ([torch.from_numpy(array.copy()) for array in arrays] for arrays in wrapper.arrays(call))
    wrapper.plan(call, on_device, on_cpu, PAGE_SIZE, partial(by_wrapper))


def expect(wrapper: Wrapper, call: KernelCall, *, num_layers: int = 2, with_lse: bool = True) -> None:
    """Plans for a call, and runs it in some layers, each from its own pages."""
    plan(wrapper, call)
    stand: Stand = wrapper.made
    lengths = call.lens(PAGE_SIZE).tolist()
    assert stand.scheduled[-1] == [call.kv_page_indptr.tolist(), lengths]
    assert wrapper.runs is not None
    for _ in range(num_layers):
        stand.ran.clear()
        out, lse = torch.zeros(2), torch.zeros(2)
        wrapper.runs[with_lse](torch.zeros(2), (torch.zeros(1), torch.zeros(1)), out, lse if with_lse else None)
        tables = (call.kv_page_indptr, call.kv_page_indices, call.kv_last_page_len)
        assert stand.ran == [[lengths, *(table.tolist() for table in tables)]]
        assert out.tolist() == [1.0, 1.0]


def growing(count: int, *, first: int = 0, seed: int = 7) -> list[KernelCall]:
    """The same three sequences, a token longer each time."""
    return [call_of(15 + step, 40 + step, 1 + step, seed=seed) for step in range(first, first + count)]


def test_the_wrapper_plans_until_its_kernels_are_loaded_and_known() -> None:
    wrapper = Wrapper(Stand(), 0, 0)
    for call in growing(8):
        expect(wrapper, call)
    assert (wrapper.made.num_plans, wrapper.made.num_runs) == (2, 2)


def test_either_kind_of_run_follows_its_plan() -> None:
    wrapper = Wrapper(Stand(), 0, 0)
    for number, call in enumerate(growing(12)):
        expect(wrapper, call, with_lse=number % 3 > 0)
    assert wrapper.made.num_plans == 2
    assert wrapper.made.num_runs <= 6


def test_a_batch_of_another_size_is_planned_by_the_wrapper() -> None:
    wrapper = Wrapper(Stand(), 0, 0)
    for round_ in range(3):
        for call in growing(4):
            expect(wrapper, call)
        for tokens in (3, 4, 5):
            expect(wrapper, call_of(tokens, 90 + tokens))
        assert wrapper.made.num_plans == 3 + 2 * round_


def test_a_plan_of_a_level_above_the_last_is_kept_until_the_next_one() -> None:
    """Long lists of a batch that decodes stay in their level for many steps."""
    wrapper = Wrapper(Stand(), 0, 0)
    first, *others = (evolve(call, is_last=False) for call in growing(6))
    for call in (first, *others):
        expect(wrapper, call)
        assert wrapper.is_planned_for(call)
        assert wrapper.is_planned_for(evolve(call)), "the same lists"
        assert not any(wrapper.is_planned_for(other) for other in (first, *others) if other is not call)
    last = evolve(first, is_last=True)
    expect(wrapper, last)
    assert not wrapper.is_planned_for(last), "a last level has other lists with every step"
    assert not wrapper.is_planned_for(first)


def test_new_workspaces_are_for_new_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WrapperSet, "_make", lambda *_: Stand())
    wrappers = WrapperSet(PagedKVCacheManager(4, PAGE_SIZE, 8, 128, torch.bfloat16, "cpu"), 32, 132, {})
    sizes = iter([(32 << 20, 0)] * 5 + [(48 << 20, 9 << 20)] * 4)
    monkeypatch.setattr(WrapperSet, "_workspace_sizes", lambda *_: next(sizes))
    for call in growing(9):
        wrapper = wrappers.sized(call, 0, 0)
        expect(wrapper, call)
    assert wrapper.made.num_plans == 3
    assert [len(workspace) for workspace in wrapper.made.workspaces] == [48 << 20, 9 << 20]


@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_nothing_is_planned_after_a_plan_that_failed(at: int) -> None:
    wrapper = Wrapper(Stand(), 0, 0)
    calls = growing(9)
    for call in calls[:at]:
        expect(wrapper, call)
    wrapper.made.fails = True
    with pytest.raises(RuntimeError, match="no memory"):
        plan(wrapper, calls[at])
    assert wrapper.runs is None
    assert wrapper.replans is None
    wrapper.made.fails = False
    for call in calls[at:]:
        expect(wrapper, call)


def test_a_wrapper_that_copies_its_pages_makes_every_plan() -> None:
    wrapper = Wrapper(Stand(copies_pages=True), 0, 0)
    for call in growing(6):
        expect(wrapper, call)
    assert wrapper.made.num_plans == 6


def test_a_wrapper_that_keeps_its_arrays_elsewhere_makes_every_plan() -> None:
    wrapper = Wrapper(Stand(keeps_last=False), 0, 0)
    for call in growing(6):
        expect(wrapper, call)
    assert wrapper.made.num_plans == 6


def test_a_kernel_that_is_told_the_schedule_twice_is_noted_anew() -> None:
    wrapper = Wrapper(Stand(doubles=True), 0, 0)
    for call in growing(6):
        expect(wrapper, call)
    assert (wrapper.made.num_plans, wrapper.made.num_runs) == (2, 6)


def test_runs_of_an_earlier_plan_stay_as_they_were() -> None:
    """Two sets of wrappers take turns, and what one was planned for is run after the other was planned."""
    wrapper = Wrapper(Stand(), 0, 0)
    for call in growing(4):
        expect(wrapper, call)
    earlier, runs = call, wrapper.runs
    assert runs is not None
    assert isinstance(runs[1], BoundRun)
    expect(wrapper, growing(1, first=4)[0])
    wrapper.made.ran.clear()
    runs[1](torch.zeros(2), (torch.zeros(1), torch.zeros(1)), torch.zeros(2), torch.zeros(2))
    assert wrapper.made.ran[0][1] == earlier.kv_page_indptr.tolist()
