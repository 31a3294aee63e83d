"""A step's calls padded to sizes that stay the same, so that a CUDA graph can be replayed for later steps; numpy only.

A graph has fixed its launches and their memory: how many rows each call has, how many groups, how many parts. A step is
padded to the sizes of a form, and steps of one form can use one graph:

    form    8 rows   fa3: 16 rows of 4 groups, any pages   decode: 8 rows of 8 groups, any pages
    step    5 rows, one shared prefix in 2 slices
    fa3     groups of 5 5 | 6 0 rows     2 real, then 1 with the rows that are left, reading one token of page 0
    decode  groups of 1 1 1 1 1 | 1 1 1  likewise
    merge   row 0: parts 0 5 16 ... row 4: parts 4 9 20, rows 5 to 7: none

What padding computes is merged into no row. fa2 chooses its tiles by the rows of the groups, but by the most that they
could have where sizes stay the same: with small groups that is several times slower. There it is planned once, for its
groups and pages as they are, and these belong to the form: another prefix makes another form.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Literal

import numpy as np
from attrs import define, evolve

from seqattn.attention.calls import KernelCall, Work
from seqattn.load import LONG_GROUPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    Int32Array = npt.NDArray[np.int32]

__all__ = [
    "CallForm",
    "Sizes",
    "StepForm",
    "form_of",
    "key_of",
    "next_padded",
    "nothing",
    "padded",
    "page_by_page",
]

#: fa2 takes its largest tiles for groups with more rows than this, times the query heads of a KV head
_MOST_SMALL_ROWS = 64


@define(slots=True, frozen=True)
class Sizes:
    """What forms depend on beside the batch.

    Attributes:
        heads_each: query heads that share a KV head.
        num_pages: pages of the cache.
        pages_each: the most pages of a sequence.
    """

    heads_each: int
    num_pages: int
    pages_each: int


@define(slots=True, frozen=True)
class CallForm:
    """What stays the same in a call.

    Attributes:
        kernel, by_group: as in `KernelCall`.
        gathered: it reads gathered queries.
        num_rows, num_groups: of every step.
        num_pages: the most of a step.
        span: as in `KernelCall`: a graph holds where its array begins and ends.
        tables: the bytes of its arrays, if it is planned once; empty otherwise.
    """

    kernel: Literal["decode", "fa2", "fa3"]
    by_group: bool
    gathered: bool
    num_rows: int
    num_groups: int
    num_pages: int
    span: tuple[int, int] | None = None
    tables: bytes = b""


@define(slots=True, frozen=True)
class StepForm:
    """What stays the same in a step.

    Attributes:
        num_rows: sequences, padding included.
        calls: coarsest level first.
        direct: as in `Work`.
    """

    num_rows: int
    calls: tuple[CallForm, ...]
    direct: bool


def form_of(work: Work, num_rows: int, sizes: Sizes) -> StepForm | None:
    """The form of a decoding step padded to `num_rows` sequences; None if it fits none. O(pages of small groups)."""
    calls = tuple(_call_form(call, num_rows, sizes) for call in work.calls)
    for call, form in zip(work.calls, calls, strict=True):
        if len(call.kv_page_indices) + form.num_groups > form.num_pages and not form.tables:
            return None
    if not calls or calls[-1].kernel != "decode" or calls[-1].gathered:
        return None
    return StepForm(num_rows, calls, work.direct)


def key_of(form: StepForm, inputs: Sequence[torch.Tensor]) -> tuple[object, ...]:
    """What a graph is known by: its form, and what stays the same in the model's inputs."""
    return (form, *((x.shape[1:], x.dtype) for x in inputs))


def _call_form(call: KernelCall, num_rows: int, sizes: Sizes) -> CallForm:
    gathered, num_groups = call.first_query is not None, len(call.kv_last_page_len)
    if call.kernel == "decode":
        # Of long lists there are few: padding takes room from their parts, so there is little of it.
        rows = (num_groups // LONG_GROUPS + 1) * LONG_GROUPS if gathered else num_rows
        return CallForm("decode", False, gathered, rows, rows, rows * (sizes.pages_each + 1))  # noqa: FBT003  by_group
    if call.kernel == "fa2" and call.num_rows * sizes.heads_each <= _MOST_SMALL_ROWS * num_groups:
        tables = (call.qo_indptr, call.kv_page_indptr, call.kv_page_indices, call.kv_last_page_len)
        found = b"".join(table.tobytes() for table in tables)
        num_pages = len(call.kv_page_indices)
        return CallForm("fa2", False, gathered, call.num_rows, num_groups, num_pages, tables=found)  # noqa: FBT003  as above
    rows = num_rows * -(-call.num_rows // num_rows)
    groups = 1 << num_groups.bit_length()  # above the groups that there are: at least one is padding
    return CallForm(call.kernel, call.by_group, gathered, rows, groups, sizes.num_pages + groups, call.span)


def padded(work: Work, form: StepForm, heads_each: int) -> Work:
    """The step in the sizes of its form; parts that belong to no row are left unmerged. O(pages)."""
    if form.direct:
        (call,), (size,) = work.calls, form.calls
        filled = _filled(call, size, 1)
        return evolve(work, calls=(evolve(filled, num_rows=size.num_rows),), num_parts=size.num_rows)
    calls, num_parts, num_queries = [], 0, 0
    part_codes, codes = work.part_codes.copy(), []
    for call, size in zip(work.calls, form.calls, strict=True):
        part = (work.part_codes >> 1) - call.first_part
        mine = (part >= 0) & (part < call.num_rows)
        part_codes[mine] += 2 * (num_parts - call.first_part)
        if call.first_query is not None:
            codes.append(work.query_codes[call.first_query : call.first_query + call.num_rows])
            codes.append(np.zeros(size.num_rows - call.num_rows, dtype=np.int32))
        filled = call if size.tables else _filled(call, size, heads_each if size.by_group else 1)
        first_query = num_queries if size.gathered else None
        calls.append(evolve(filled, first_query=first_query, first_part=num_parts, num_rows=size.num_rows))
        num_parts, num_queries = num_parts + size.num_rows, num_queries + size.num_rows * size.gathered
    end = np.full(form.num_rows + 1 - len(work.part_indptr), work.part_indptr[-1], dtype=np.int32)
    query_codes = np.concatenate([work.query_codes[:0], *codes])
    return Work(tuple(calls), query_codes, np.concatenate([work.part_indptr, end]), part_codes, num_parts, direct=False)


def next_padded(last: tuple[Work, Work] | None, work: Work, form: StepForm, heads_each: int) -> Work:
    """`padded`, of which only the last call is made anew if all else is what it was.

    Args:
        last: a step of the form before padding and after, or None.
        work: the step.
        form: of both.
        heads_each: query heads that share a KV head.
    """
    if last is None or work.part_codes is not last[0].part_codes or len(work.calls) != len(last[0].calls):
        return padded(work, form, heads_each)
    if work.direct or not all(map(is_, work.calls[:-1], last[0].calls[:-1])):
        return padded(work, form, heads_each)
    old, size = last[1].calls[-1], form.calls[-1]
    call = _filled(work.calls[-1], size, heads_each if size.by_group else 1)
    call = evolve(call, first_query=old.first_query, first_part=old.first_part, num_rows=old.num_rows)
    return evolve(last[1], calls=(*last[1].calls[:-1], call))


def _filled(call: KernelCall, size: CallForm, rows_each: int) -> KernelCall:
    """The call with groups of padding, `rows_each` rows for a query row.

    Each reads one token of page 0; in a call with a span, what is behind the end of its array, which are zeros.
    """
    missing = size.num_groups - len(call.kv_last_page_len)
    if not missing and call.kernel == "decode":
        return call
    if call.kernel == "decode":
        more_rows = call.qo_indptr[-1] + np.arange(1, missing + 1)
    else:
        more_rows = np.full(missing, size.num_rows * rows_each)
    more_pages = call.kv_page_indptr[-1] + np.arange(1, missing + 1)
    return evolve(
        call,
        qo_indptr=np.concatenate([call.qo_indptr, more_rows]).astype(np.int32),
        kv_page_indptr=np.concatenate([call.kv_page_indptr, more_pages]).astype(np.int32),
        kv_page_indices=np.concatenate([call.kv_page_indices, np.zeros(missing, dtype=np.int32)]),
        kv_last_page_len=np.concatenate([call.kv_last_page_len, np.ones(missing, dtype=np.int32)]),
    )


def page_by_page(work: Work, last: tuple[Work, Work] | None = None) -> Work:
    """The same step with every list read as a list, wherever its pages lie: its form tells nothing of places.

    Args:
        work: the step.
        last: another step and what this made of it: calls that it shares with `work` stay the same objects.
    """
    known = {} if last is None else {id(old): new for old, new in zip(last[0].calls, last[1].calls, strict=True)}

    def by_page(call: KernelCall) -> KernelCall:
        return call if call.span is None else known.get(id(call)) or evolve(call, span=None)

    return evolve(work, calls=tuple(map(by_page, work.calls)))


def nothing() -> Work:
    """A decoding step without sequences: padded, all of it is padding."""
    none, zero = np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int32)
    call = KernelCall(
        "decode", zero, zero, none, none, causal=True, by_group=False, first_query=None, first_part=0, num_rows=0
    )
    return Work((call,), none, none, none, 0, direct=True)
