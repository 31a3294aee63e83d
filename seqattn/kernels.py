"""Small CUDA kernels around attention, in Triton: queries out, results in, page tails copied.

A row of queries has `num_heads` heads, of which `heads_each` neighbours share a KV head. Two ways to lay them out:

    by head    q0 q1 q2 q3                 num_heads 4: as the caller has them
    by group   q0 q2 | q1 q3               heads_each 2: a row becomes two rows, of one query head for each KV head

By group, a kernel that knows nothing of shared KV heads reads each of them once for all its query heads. Both ways take
the same memory, so that row j begins at element `j * num_heads * head_dim` in either. A code names a row and its way:
`2 * row + by_group`.

Importing this file needs Triton, which comes with torch on Linux: only functions that have CUDA tensors import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

__all__ = ["copy_slots", "gather_queries", "merge_parts"]


@triton.jit  # type: ignore[untyped-decorator]  # Triton ships no types
def _gather(  # type: ignore[no-untyped-def]  # and reads none but its own
    q,
    out,
    codes,
    row_stride,
    head_stride,
    num_heads: tl.constexpr,
    heads_each: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    code = tl.load(codes + row)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < num_heads * head_dim
    head, element = at // head_dim, at % head_dim
    values = tl.load(q + (code // 2).to(tl.int64) * row_stride + head * head_stride + element, mask=inside)
    if code % 2 == 1:
        head = (head % heads_each) * (num_heads // heads_each) + head // heads_each
    tl.store(out + row.to(tl.int64) * (num_heads * head_dim) + head * head_dim + element, values, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _merge(  # type: ignore[no-untyped-def]  # as above
    part_out,
    part_lse,
    indptr,
    codes,
    out,
    lse,
    num_heads: tl.constexpr,
    heads_each: tl.constexpr,
    head_dim: tl.constexpr,
    head_block: tl.constexpr,
    dim_block: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    head = tl.program_id(1) * head_block + tl.arange(0, head_block)
    element = tl.arange(0, dim_block)
    is_head = head < num_heads
    inside = is_head[:, None] & (element < head_dim)[None, :]
    by_group = (head % heads_each) * (num_heads // heads_each) + head // heads_each
    top = tl.full([head_block], float("-inf"), tl.float32)
    total = tl.zeros([head_block], tl.float32)
    mixed = tl.zeros([head_block, dim_block], tl.float32)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    for i in range(begin, end):
        code = tl.load(codes + i)
        source = (code // 2).to(tl.int64) * num_heads + tl.where(code % 2 == 1, by_group, head)
        score = tl.load(part_lse + source, mask=is_head, other=float("-inf"))
        values = tl.load(part_out + source[:, None] * head_dim + element[None, :], mask=inside, other=0.0)
        higher = tl.maximum(top, score)
        # -inf minus -inf is NaN: while nothing has been seen the weights are those of a finite maximum.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = tl.exp2(top - base), tl.exp2(score - base)
        mixed = mixed * old[:, None] + values.to(tl.float32) * new[:, None]
        total = total * old + new
        top = higher
    safe = tl.where(total == 0.0, 1.0, total)
    target = row.to(tl.int64) * num_heads + head
    result = mixed / safe[:, None]
    tl.store(out + target[:, None] * head_dim + element[None, :], result.to(out.dtype.element_ty), mask=inside)
    seen = tl.where(total == 0.0, float("-inf"), top + tl.log2(safe))
    tl.store(lse + target, seen, mask=is_head)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _copy(  # type: ignore[no-untyped-def]  # as above
    keys,
    values,
    table,
    num_copies,
    layer_stride,
    page_stride,
    slot_stride,
    head_stride,
    num_heads: tl.constexpr,
    head_words: tl.constexpr,
    page_words: tl.constexpr,
    block: tl.constexpr,
) -> None:
    copy = tl.program_id(0)
    layer = tl.program_id(2) // 2
    src = tl.load(table + copy).to(tl.int64)
    dst = tl.load(table + num_copies + copy).to(tl.int64)
    num_slots = tl.load(table + 2 * num_copies + copy)
    at = tl.program_id(1) * block + tl.arange(0, block)
    slot, rest = at // (num_heads * head_words), at % (num_heads * head_words)
    where = (
        layer.to(tl.int64) * layer_stride + slot * slot_stride + rest // head_words * head_stride + rest % head_words
    )
    inside = (at < page_words) & (slot < num_slots)
    if tl.program_id(2) % 2 == 0:
        found = tl.load(keys + where + src * page_stride, mask=inside)
        tl.store(keys + where + dst * page_stride, found, mask=inside)
    else:
        found = tl.load(values + where + src * page_stride, mask=inside)
        tl.store(values + where + dst * page_stride, found, mask=inside)


def gather_queries(q: torch.Tensor, codes: torch.Tensor, out: torch.Tensor, heads_each: int) -> None:
    """Writes rows of `q` to `out`, each in the way its code says.

    Args:
        q: [rows, num_heads, head_dim], elements of a head side by side.
        codes: int32 [n], for each row of `out` the row of `q` and the way to lay it out.
        out: [n, num_heads, head_dim] of `q`'s dtype, contiguous.
        heads_each: query heads that share a KV head.
    """
    num_heads, head_dim = q.shape[1:]
    block = min(2048, triton.next_power_of_2(num_heads * head_dim))
    grid = (len(codes), triton.cdiv(num_heads * head_dim, block))
    _launch(_gather, grid)(q, out, codes, q.stride(0), q.stride(1), num_heads, heads_each, head_dim, block)


def merge_parts(
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    indptr: torch.Tensor,
    codes: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    heads_each: int,
) -> None:
    """Merges what each row got from each part of its tokens, weighted by 2**lse, in float32.

    Args:
        part_out: [parts, num_heads, head_dim], contiguous, laid out in either way.
        part_lse: float32, base 2, [parts, num_heads], laid out likewise.
        indptr: int32 [rows + 1], where the parts of each row of `out` begin in `codes`.
        codes: int32, row of `part_out` and the way it is laid out.
        out: [rows, num_heads, head_dim], contiguous; 0 for a row without parts.
        lse: float32, base 2, [rows, num_heads]; -inf for a row without parts.
        heads_each: query heads that share a KV head.
    """
    num_rows, num_heads, head_dim = out.shape
    dim_block = triton.next_power_of_2(head_dim)
    head_block = max(1, min(triton.next_power_of_2(num_heads), 1024 // dim_block))
    grid = (num_rows, triton.cdiv(num_heads, head_block))
    sizes = (num_heads, heads_each, head_dim, head_block, dim_block)
    _launch(_merge, grid)(part_out, part_lse, indptr, codes, out, lse, *sizes)


def copy_slots(keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor) -> None:
    """Copies the first slots of pages to other pages, keys and values of all layers in one launch.

    Args:
        keys: integers of the cache's bytes, strided [layers, pages, slots, heads, words], words side by side.
        values: likewise, with the same strides.
        table: int32 [3, copies]: source pages, destination pages, slots to copy. No page is both read and written.
    """
    num_layers, _, num_slots, num_heads, head_words = keys.shape
    page_words, num_copies = num_slots * num_heads * head_words, table.shape[1]
    block = min(1024, triton.next_power_of_2(page_words))
    grid = (num_copies, triton.cdiv(page_words, block), 2 * num_layers)
    sizes = (num_copies, *keys.stride()[:4], num_heads, head_words, page_words, block)
    _launch(_copy, grid)(keys, values, table, *sizes)


def _launch(kernel: Any, grid: tuple[int, ...]) -> Any:  # noqa: ANN401  Triton ships no types
    return kernel[grid]
