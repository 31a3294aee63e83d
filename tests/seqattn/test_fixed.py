"""Steps padded to the sizes of a form: computed with their padding they are dense attention, and forms are few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from attrs import evolve, fields
from hypothesis import given
from hypothesis import strategies as st

from seqattn.attention.calls import Choice, KernelCall, Work, next_work, work_of
from seqattn.attention.fixed import Sizes, StepForm, form_of, next_padded, nothing, padded, page_by_page
from seqattn.attention.plan import BatchPlan, plan_batch
from seqattn.cache import PagedKVCacheManager
from seqattn.forest import Run
from seqattn.hybrid import pack_hybrid, pack_runs
from tests.seqattn.test_calls import HEADS_EACH, NUM_KV_HEADS, WAYS, check
from tests.seqattn.truth import Batch, batch_of, batches, fill, pack

NUM_PAGES = 64
SIZES = Sizes(HEADS_EACH, NUM_PAGES, 8)


class Step(NamedTuple):
    """A decoding batch as calls."""

    batch: Batch
    plan: BatchPlan
    work: Work

    def form(self, num_rows: int) -> StepForm:
        form = form_of(self.work, num_rows, SIZES)
        assert form is not None
        return form


def step(tables: Sequence[Sequence[int]], choices: Sequence[Choice], last: Sequence[int] | None = None) -> Step:
    batch = batch_of([list(table) for table in tables], list(last or [2] * len(tables)), 4, [1] * len(tables))
    data = pack_hybrid(batch.tables, batch.num_tokens, page_size=4, query_lens=None, cost_model=None)
    plan = plan_batch(manager_of(batch), data, None, causal=True)
    return Step(batch, plan, work_of(plan, choices, HEADS_EACH, 4))


def manager_of(batch: Batch) -> PagedKVCacheManager:
    manager = PagedKVCacheManager(NUM_PAGES, batch.page_size, NUM_KV_HEADS, 4, torch.float32, "cpu")
    fill(manager, batch, 0)
    return manager


def shared(num_sequences: int, pages: Sequence[int] = (0, 1, 2, 3, 4)) -> list[list[int]]:
    return [[*pages, 10 + i] for i in range(num_sequences)]


@given(batches(max_sequences=5, max_pages=4), st.integers(0, 3), st.data())
def test_padded_calls_and_codes_are_dense_attention(batch: Batch, more: int, data: st.DataObject) -> None:
    batch = batch._replace(query_lens=[1] * len(batch.tables))
    num_pages = 1 + max(int(table.max()) for table in batch.tables)
    manager = PagedKVCacheManager(num_pages, batch.page_size, NUM_KV_HEADS, 4, torch.float32, "cpu")
    fill(manager, batch, 0)
    packed = pack_hybrid(batch.tables, batch.num_tokens, page_size=batch.page_size, query_lens=None, cost_model=None)
    plan = plan_batch(manager, packed, None, causal=True)
    choices = [data.draw(WAYS) for _ in plan.levels[:-1]]
    work = work_of(plan, [*choices, Choice("decode")], HEADS_EACH, batch.page_size)
    form = form_of(work, len(batch.tables) + more, Sizes(HEADS_EACH, num_pages, 40))
    assert form is not None
    fixed = padded(work, form, HEADS_EACH)
    for call, size in zip(fixed.calls, form.calls, strict=True):
        assert len(call.kv_last_page_len) == size.num_groups
        assert call.qo_indptr[-1] == call.num_rows * (HEADS_EACH if call.by_group else 1)
        assert len(call.kv_page_indices) == call.kv_page_indptr[-1] <= size.num_pages
    assert len(fixed.query_codes) == sum(call.num_rows for call in form.calls if call.gathered)
    if not fixed.direct:
        assert len(fixed.part_indptr) == form.num_rows + 1
    check_padded(fixed, plan, manager, batch, more)


def check_padded(work: Work, plan: BatchPlan, manager: PagedKVCacheManager, batch: Batch, more: int) -> None:
    """Padding rows are sequences of one token of page 0: with them the step is a larger batch."""
    table = [np.zeros(1, dtype=np.int32)] * more
    larger = Batch(
        batch.page_size, [*batch.tables, *table], [*batch.num_tokens, *[1] * more], [*batch.query_lens, *[1] * more]
    )
    rows = np.arange(plan.num_rows)
    check(evolve(plan, rows=rows), (), manager, batch, True, work=work, larger=larger)


def test_the_picture_of_a_padded_step() -> None:
    found = step(shared(5), [Choice("fa3", 2), Choice("decode")])
    work = padded(found.work, found.form(8), HEADS_EACH)
    top, own = work.calls
    assert top.qo_indptr.tolist() == [n * HEADS_EACH for n in (0, 5, 10, 16, 16)]
    assert top.kv_page_indptr.tolist() == [0, 2, 5, 6, 7]
    assert own.qo_indptr.tolist() == list(range(9))
    parts = np.split(work.part_codes >> 1, work.part_indptr[1:-1])
    assert [part.tolist() for part in parts] == [[i, 5 + i, 16 + i] for i in range(5)] + [[]] * 3


def test_steps_with_other_pages_lengths_and_sequences_have_the_same_form() -> None:
    ways = [Choice("fa3", 2), Choice("decode")]
    first = step(shared(5), ways).form(8)
    assert step(shared(5, (6, 7, 8, 9, 5)), ways).form(8) == first
    assert step(shared(7, (6, 7)), ways, [1, 2, 3, 4, 1, 2, 3]).form(8) == first
    assert step([*shared(6), [20, 21], [22]], ways).form(8) == first
    assert hash(step(shared(5), ways).form(8)) == hash(first)


def test_steps_that_need_other_launches_have_other_forms() -> None:
    first = step(shared(5), [Choice("fa3", 2), Choice("decode")])
    forms = {first.form(8), first.form(16), step(shared(5), [Choice("fa3", 1), Choice("decode")]).form(8)}
    forms.add(step([[20 + i] for i in range(5)], [Choice("decode")]).form(8))
    assert len(forms) == 4


def test_small_groups_of_fa2_are_planned_once_for_what_they_are() -> None:
    ways = [Choice("fa2"), Choice("decode")]
    first = step(shared(5), ways)
    assert first.form(8).calls[0].tables
    assert padded(first.work, first.form(8), HEADS_EACH).calls[0].qo_indptr is first.work.calls[0].qo_indptr
    longer = step(shared(5), ways, [3] * 5)
    assert longer.form(8) == first.form(8)
    assert step(shared(5, (6, 7, 8, 9, 5)), ways).form(8) != first.form(8)


def in_line(first: int, num_sequences: int = 5) -> Step:
    """Sequences on three long pages that lie side by side."""
    tables = [[*range(first, first + 3), 20 + i] for i in range(num_sequences)]
    batch = batch_of(tables, [2] * num_sequences, 512, [1] * num_sequences)
    manager = manager_of(batch)
    data = pack_hybrid(batch.tables, batch.num_tokens, page_size=512, query_lens=None, cost_model=None)
    plan = plan_batch(manager, data, None, causal=True)
    work = work_of(plan, [Choice("fa3", 2), Choice("decode")], HEADS_EACH, 512, has_spans=True)
    assert work.calls[0].span == (first, 3)
    return Step(batch, plan, work)


def test_a_graph_holds_where_an_array_lies() -> None:
    """Sequences may come and go; another place in memory is another form."""
    first = in_line(3)
    assert in_line(3, 7).form(8) == first.form(8)
    assert in_line(4).form(8) != first.form(8)
    call = padded(first.work, first.form(8), HEADS_EACH).calls[0]
    assert call.span == (3, 3)
    assert call.qo_indptr.tolist() == [n * HEADS_EACH for n in (0, 5, 10, 16, 16)]
    assert call.kv_page_indptr.tolist() == [0, 1, 3, 4, 5], "padding reads behind the end of the array: zeros"
    check_padded(padded(first.work, first.form(8), HEADS_EACH), first.plan, manager_of(first.batch), first.batch, 3)


def test_what_two_steps_share_is_the_same_object_page_by_page_too() -> None:
    work = in_line(3).work
    paged = page_by_page(work)
    again = page_by_page(evolve(work), (work, paged))
    assert all(new is old for new, old in zip(again.calls, paged.calls, strict=True))
    assert [call.span for call in again.calls] == [None] * len(work.calls)
    assert any(call.span for call in work.calls)


def test_a_step_page_by_page_has_a_form_for_any_prompt() -> None:
    first, other = (page_by_page(in_line(n).work) for n in (3, 4))
    assert form_of(first, 8, SIZES) == form_of(other, 8, SIZES)
    assert first.calls[0].span is None
    assert first.calls[1] is not None
    found = in_line(3)
    check(found.plan, (), manager_of(found.batch), found.batch, True, work=page_by_page(found.work))


def test_large_groups_of_fa2_are_padded() -> None:
    call = step(shared(40), [Choice("fa2"), Choice("decode")]).form(40).calls[0]
    assert not call.tables
    assert (call.num_rows, call.num_groups) == (40, 2)


def with_long(num_long: int, num_sequences: int = 9) -> Step:
    """Sequences that share nothing, of which some have all pages but the last in a level above."""
    tables = [[5 * i + n for n in range(5 if i < num_long else 1)] for i in range(num_sequences)]
    batch = batch_of(tables, [2] * num_sequences, 4, [1] * num_sequences)
    runs = [Run(i, i + 1, 0, 4, None) for i in range(num_long)]
    forest, rows = (list(range(num_sequences)), runs), np.ones(num_sequences, dtype=np.int64)
    data = pack_runs(batch.tables, np.array(batch.num_tokens), rows, forest, None, page_size=4)
    plan = plan_batch(manager_of(batch), data, None, causal=True)
    return Step(batch, plan, work_of(plan, [Choice("decode")] * 2, HEADS_EACH, 4))


def test_a_level_of_long_lists_is_padded_by_few() -> None:
    """Each group of padding is a part less that the long ones may be cut into."""
    sizes = {}
    for num_long in (1, 3, 4, 7):
        found = with_long(num_long)
        form = found.form(12)
        sizes[num_long] = [(call.num_rows, call.num_groups, call.gathered) for call in form.calls]
        check_padded(padded(found.work, form, HEADS_EACH), found.plan, manager_of(found.batch), found.batch, 3)
    four, eight = [(4, 4, True), (12, 12, False)], [(8, 8, True), (12, 12, False)]
    assert sizes == {1: four, 3: four, 4: eight, 7: eight}
    assert with_long(3).form(12) == with_long(1).form(12)


def test_a_step_that_exceeds_the_memory_for_pages_has_no_form() -> None:
    manager = PagedKVCacheManager(NUM_PAGES, 4, NUM_KV_HEADS, 4, torch.float32, "cpu")
    long = plan_batch(manager, pack(batch_of([list(range(30))], [4], 4, [1])), None, causal=True)
    work = work_of(long, [Choice("decode")], HEADS_EACH, 4)
    assert form_of(work, 1, SIZES) is None
    assert form_of(work, 1, Sizes(HEADS_EACH, NUM_PAGES, 30)) is not None


def test_calls_that_do_not_decode_have_no_form() -> None:
    assert form_of(step(shared(5), [Choice("fa2"), Choice("fa2")]).work, 8, SIZES) is None


def test_nothing_is_all_padding() -> None:
    form = form_of(nothing(), 4, SIZES)
    assert form is not None
    assert form == step([[20 + i] for i in range(3)], [Choice("decode")]).form(4)
    [call] = padded(nothing(), form, HEADS_EACH).calls
    assert call.qo_indptr.tolist() == call.kv_page_indptr.tolist() == [0, 1, 2, 3, 4]
    assert call.kv_page_indices.tolist() == [0] * 4
    assert call.kv_last_page_len.tolist() == [1] * 4


def same(a: object, b: object) -> bool:
    """Whether two works, or parts of them, hold the same numbers."""
    if isinstance(a, np.ndarray):
        return np.array_equal(a, np.asarray(b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (Work, KernelCall)):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(type(a)))
    return a == b


def test_of_the_next_step_only_the_last_call_is_padded_anew() -> None:
    ways = [Choice("fa3", 2), Choice("decode")]
    for num_rows in (5, 8):
        first = step(shared(5), ways)
        form = first.form(num_rows)
        last = first.work, padded(first.work, form, HEADS_EACH)
        grown = next_work(first.work, step([[*row, 30 + i] for i, row in enumerate(shared(5))], ways, [1] * 5).plan)
        found = next_padded(last, grown, form, HEADS_EACH)
        assert same(found, padded(grown, form, HEADS_EACH))
        assert found.calls[0] is last[1].calls[0]
        assert found.part_codes is last[1].part_codes


def test_a_step_that_does_not_follow_is_padded_in_full() -> None:
    ways = [Choice("fa3", 2), Choice("decode")]
    first, other = step(shared(5), ways), step(shared(6, (6, 7, 8, 9)), ways)
    form = first.form(8)
    last = first.work, padded(first.work, form, HEADS_EACH)
    for before in (None, last):
        assert same(next_padded(before, other.work, form, HEADS_EACH), padded(other.work, form, HEADS_EACH))
    direct = step([[20 + i] for i in range(5)], [Choice("decode")])
    last = direct.work, padded(direct.work, direct.form(8), HEADS_EACH)
    assert same(next_padded(last, direct.work, direct.form(8), HEADS_EACH), last[1])
