"""A planned batch as calls of attention kernels, and how their results come together; numpy only.

A call computes groups of rows over lists of pages. Rows of one call lie back to back, either in the caller's queries or
in a buffer of gathered queries; its results, the parts, follow those of the call before:

    3 sequences, order as the caller's, 5 shared pages in 2 slices, heads 2 for each KV head
    call 0   fa3      2 slices of 3 rows     gathered queries 0..6, by group     parts 0..6
    call 1   decode   3 sequences            the caller's queries                parts 6..9
    merge    row 0    parts 0 3 6            codes [1 7 12]      2 * part + by_group
             row 1    parts 1 4 7            codes [3 9 14]
             row 2    parts 2 5 8            codes [5 11 16]

fa3 does not share a KV head among its query heads, and computes 128 rows at a time: its rows are laid out by group
(`seqattn.kernels`), so that few sequences fill a tile. It does not split long lists of pages either: it gets them in
slices, each with the same queries once more.

Where the pages of a level's one list lie side by side in memory, fa3 can read their keys and values as one array, which
takes it a tenth to a quarter less time: a call with a `span`. Several lists are not read in this way, as parts of the
whole memory: a tile loads up to 191 tokens behind the end of a list, of whatever sequence has them, and gives them no
weight, but a value that is not finite would show all the same. Behind the end of the array there are zeros.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Literal

import numpy as np
from attrs import define, field

from seqattn.load import is_long
from seqattn.page_lists import indptr_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from seqattn.attention.plan import BatchPlan, LevelPlan

    Int64Array = npt.NDArray[np.int64]
    Int32Array = npt.NDArray[np.int32]
    Tables = tuple[Int32Array, Int32Array, Int32Array, Int32Array]

__all__ = ["Choice", "KernelCall", "Work", "is_next", "next_work", "work_of"]


@define(slots=True, frozen=True)
class Choice:
    """How a level is computed.

    Attributes:
        kernel: "decode" for one row each, above the last level too, else one of the two prefill kernels.
        slices: of the longest list of pages, for fa3 above the last level; shorter ones are cut to the same length.
    """

    kernel: Literal["decode", "fa2", "fa3"]
    slices: int = 1


@define(slots=True, frozen=True, eq=False)
class KernelCall:
    """Groups of rows for one call; all arrays int32 on the CPU.

    Attributes:
        kernel: as in `Choice`.
        qo_indptr: where each group's rows begin, [groups + 1]; by group, heads_each of them for each query row.
        kv_page_indptr, kv_page_indices, kv_last_page_len: the groups' pages, as in packed data.
        causal: rows are the last tokens of their group.
        by_group: how queries and results are laid out.
        first_query: where its rows begin among the gathered queries; None for the caller's queries as they are.
        first_part: where its rows begin among the parts.
        num_rows: its query rows.
        span: for fa3 over pages that lie side by side the first of them and how many there are; else None.
        is_last: it computes the last level.
    """

    kernel: Literal["decode", "fa2", "fa3"]
    qo_indptr: Int32Array
    kv_page_indptr: Int32Array
    kv_page_indices: Int32Array
    kv_last_page_len: Int32Array
    causal: bool
    by_group: bool
    first_query: int | None
    first_part: int
    num_rows: int
    span: tuple[int, int] | None = None
    is_last: bool = True

    @property
    def kind(self) -> tuple[str, bool]:
        """Calls of one kind can use the same wrapper, one after the other."""
        return ("fa3 in line" if self.span else self.kernel), self.by_group

    def lens(self, page_size: int) -> Int32Array:
        """Tokens of each group, all of which have pages."""
        full = self.kv_page_indptr[1:] - self.kv_page_indptr[:-1] - 1
        return full * np.int32(page_size) + self.kv_last_page_len

    @property
    def grows(self) -> bool:
        """Whether its lists are others with every step: those of a last level that decodes."""
        return self.is_last and self.kernel == "decode"

    @property
    def offsets(self) -> tuple[Int32Array, Int32Array, Int32Array]:
        """What a plan reads on the CPU."""
        return self.qo_indptr, self.kv_page_indptr, self.kv_last_page_len


@define(slots=True, frozen=True, eq=False)
class Work:
    """All calls of a batch; drawn at the top of this file.

    Attributes:
        calls: coarsest level first.
        query_codes: for each gathered query its row with the caller and its way, int32.
        part_indptr: where each caller's row begins in `part_codes`, int32 [rows + 1].
        part_codes: for each row its parts and their way, int32.
        num_parts: rows of all calls.
        direct: the one call has the caller's rows, in order: its results are the batch's, and nothing is gathered or
            merged; there are no codes.
    """

    calls: tuple[KernelCall, ...]
    query_codes: Int32Array
    part_indptr: Int32Array
    part_codes: Int32Array
    num_parts: int
    direct: bool

    def lane(self, i: int) -> int:
        """The stream of a call: 0 for the last on the caller's, 1 for the first of several, 2 for those between."""
        return 0 if i == len(self.calls) - 1 else min(i, 1) + 1


def work_of(
    plan: BatchPlan, choices: Sequence[Choice], heads_each: int, page_size: int, *, has_spans: bool = False
) -> Work:
    """The calls for a batch, level by level; groups without rows or pages are left out. O(pages + parts).

    Args:
        plan: the batch.
        choices: how to compute each level.
        heads_each: query heads that share a KV head.
        page_size: token slots in a page.
        has_spans: tokens of pages that follow one another lie side by side in memory.
    """
    if len(plan.levels) == 1 and plan.rows is None and plan.levels[0].decodes:
        return _direct(plan.levels[0], choices[0])
    rows = np.arange(plan.num_rows) if plan.rows is None else plan.rows
    builder = _Builder(rows, plan.rows is None, heads_each, page_size, has_spans)
    for i, (level, choice) in enumerate(zip(plan.levels, choices, strict=True)):
        builder.add(level, choice, is_last=i == len(plan.levels) - 1)
    return builder.work()


def _direct(level: LevelPlan, choice: Choice) -> Work:
    """A batch that decodes, without shared levels and in the caller's order, which every builder comes to."""
    num_rows, none = len(level.kv_last_page_len), np.zeros(0, dtype=np.int32)
    tables = (level.qo_indptr, level.kv_page_indptr, level.kv_page_indices, level.kv_last_page_len)
    call = KernelCall(
        choice.kernel, *tables, level.causal, by_group=False, first_query=None, first_part=0, num_rows=num_rows
    )
    return Work((call,), none, none, none, num_rows, direct=True)


def is_next(old: BatchPlan, new: BatchPlan) -> bool:
    """Whether two batches differ in nothing but pages and lengths of the last level, and decode."""
    same = len(old.levels) == len(new.levels) and old.num_rows == new.num_rows and old.rows is new.rows
    return same and new.levels[-1].decodes and all(map(is_, old.levels[:-1], new.levels[:-1]))


def next_work(work: Work, plan: BatchPlan) -> Work:
    """The calls for a batch that `is_next` to an earlier one.

    Args:
        work: of the earlier batch, which decodes too.
        plan: the batch.
    """
    level = plan.levels[-1]
    indptr, pages, last = level.kv_page_indptr, level.kv_page_indices, level.kv_last_page_len
    if plan.rows is not None:
        groups = np.argsort(plan.rows)
        pages = pages[_ranges(indptr[groups], indptr[groups + 1])]
        indptr, last = indptr_of(level.page_lens[groups]), last[groups]
    *shared, old = work.calls
    how = (old.causal, old.by_group, old.first_query, old.first_part, old.num_rows)
    # Both batches have a row each; the tensors of the earlier one may hold something else by now.
    call = KernelCall(old.kernel, level.qo_indptr, indptr, pages, last, *how)
    codes = (work.query_codes, work.part_indptr, work.part_codes)
    return Work((*shared, call), *codes, work.num_parts, work.direct)


@define(slots=True, eq=False)
class _Builder:
    """Calls so far, with what has been gathered for them."""

    rows: Int64Array  # the caller's row of each row in group order
    in_order: bool  # they are the same
    heads_each: int
    page_size: int
    has_spans: bool
    calls: list[KernelCall] = field(factory=list)
    queries: list[Int64Array] = field(factory=list)  # codes of the gathered queries of each call
    parts: list[tuple[Int64Array, Int64Array]] = field(factory=list)  # the caller's rows and the codes of their parts
    num_queries: int = 0
    num_parts: int = 0

    def add(self, level: LevelPlan, choice: Choice, *, is_last: bool) -> None:
        """Makes a level a call, unless nothing in it is to be read."""
        page_lens = level.page_lens
        used = (level.row_lens > 0) & (page_lens > 0)
        groups = used.nonzero()[0]
        if not len(groups):
            return
        by_group = choice.kernel == "fa3" and not is_last
        slices, rows = choice.slices if by_group else 1, self.rows
        if len(groups) == len(used) and slices == 1 and (choice.kernel != "decode" or self.in_order):  # as it is
            tables = (level.qo_indptr, level.kv_page_indptr, level.kv_page_indices, level.kv_last_page_len)
        else:
            if choice.kernel == "decode":  # one row each: with the pages in the caller's order nothing is gathered
                groups = groups[np.argsort(rows[level.qo_indptr[groups]])]
            tables, at = _cut(level, groups, slices)
            rows = rows[at]
        qo_indptr, _, pages, _ = tables
        if by_group and self.heads_each > 1:
            tables = (qo_indptr * np.int32(self.heads_each), *tables[1:])
        longest = -(-int(page_lens.max()) // slices) * self.page_size
        in_line = by_group and self.has_spans and is_long(longest) and level.in_line
        span = (int(pages[0]), len(pages)) if in_line else None
        queries, parts, num_rows = self._gather(rows, by_group=by_group), self.num_parts, len(rows)
        places = (by_group, queries, parts, num_rows)
        call = KernelCall(choice.kernel, *tables, level.causal, *places, span, is_last)
        self.calls.append(call)
        self.num_parts += num_rows
        self.parts.append((rows, np.arange(2 * parts + by_group, 2 * self.num_parts + by_group, 2)))

    def _gather(self, rows: Int64Array, *, by_group: bool) -> int | None:
        """Notes queries by their rows with the caller; None if they are the caller's as they are."""
        is_theirs = len(rows) == len(self.rows) and (not by_group or self.heads_each == 1)
        if is_theirs and (rows[1:] > rows[:-1]).all():
            return None
        self.queries.append(2 * rows + by_group)
        self.num_queries += len(rows)
        return self.num_queries - len(rows)

    def work(self) -> Work:
        """What was added, with the parts of each row together."""
        none = np.zeros(0, dtype=np.int32)
        if len(self.calls) == 1 and self.num_parts == len(self.rows) and not self.num_queries:
            return Work(tuple(self.calls), none, none, none, self.num_parts, direct=True)
        rows, codes = (np.concatenate([none, *(part[i] for part in self.parts)]) for i in (0, 1))
        by_row = np.argsort(rows, kind="stable")
        return Work(
            tuple(self.calls),
            np.concatenate([none, *self.queries]).astype(np.int32),
            indptr_of(np.bincount(rows, minlength=len(self.rows))),
            codes[by_row].astype(np.int32),
            self.num_parts,
            direct=False,
        )


def _cut(level: LevelPlan, groups: Int64Array, slices: int) -> tuple[Tables, Int64Array]:
    """The tables of these groups of a level, in slices, and where their rows stand in group order."""
    page_lens, pages = level.page_lens, level.kv_page_indices
    which, begin, end = _sliced(page_lens, groups, slices)
    lens, first, first_page = level.row_lens[which], level.qo_indptr[which], level.kv_page_indptr[which]
    kv_page_indptr = indptr_of(end - begin)
    if kv_page_indptr[-1] != len(pages) or (groups[1:] < groups[:-1]).any():
        pages = pages[_ranges(first_page + begin, first_page + end)]
    last = np.where(end == page_lens[which], level.kv_last_page_len[which], level.page_size)
    return (indptr_of(lens), kv_page_indptr, pages, last.astype(np.int32)), _ranges(first, first + lens)


def _sliced(num_pages: Int64Array, groups: Int64Array, slices: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The slices of each group's list of pages: its group, where it begins and where it ends.

    None is longer than those of the longest list, which is cut into `slices`.
    """
    if slices == 1:
        return groups, np.zeros_like(groups), num_pages[groups]
    most = -(-int(num_pages[groups].max()) // slices)
    num_slices = -(-num_pages[groups] // most)
    which, of = np.repeat(groups, num_slices), np.repeat(num_slices, num_slices)
    nth = _ranges(np.zeros_like(num_slices), num_slices)
    return which, num_pages[which] * nth // of, num_pages[which] * (nth + 1) // of


def _ranges(begin: npt.NDArray[np.integer], end: npt.NDArray[np.integer]) -> Int64Array:
    """The numbers from `begin[0]` to `end[0]`, then those from `begin[1]`, and so on."""
    lens = end - begin
    before = np.cumsum(lens) - lens
    numbers: Int64Array = np.arange(int(lens.sum())) + np.repeat(begin - before, lens)
    return numbers
