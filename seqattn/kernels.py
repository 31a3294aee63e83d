"""Small CUDA kernels around attention, in Triton: queries out, results in, page tails copied, new tokens written.

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
from triton.runtime import driver

if TYPE_CHECKING:
    import torch

__all__ = ["Launcher", "can_repeat", "power_of_2"]


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
    inside = slot < num_slots
    if tl.program_id(2) % 2 == 0:
        found = tl.load(keys + where + src * page_stride, mask=inside)
        tl.store(keys + where + dst * page_stride, found, mask=inside)
    else:
        found = tl.load(values + where + src * page_stride, mask=inside)
        tl.store(values + where + dst * page_stride, found, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _append(  # type: ignore[no-untyped-def]  # as above
    keys,
    values,
    key_cache,
    value_cache,
    places,
    num_rows,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    page = tl.load(places + row).to(tl.int64)
    slot = tl.load(places + num_rows + row).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = (at < num_heads * head_dim) & (page >= 0)
    head, element = at // head_dim, at % head_dim
    where = page * page_stride + slot * slot_stride + head * head_stride + element
    source = row.to(tl.int64)
    found = tl.load(keys + source * key_row_stride + head * key_head_stride + element, mask=inside)
    tl.store(key_cache + where, found, mask=inside)
    found = tl.load(values + source * value_row_stride + head * value_head_stride + element, mask=inside)
    tl.store(value_cache + where, found, mask=inside)


class Launcher:
    """Launches the kernels.

    Triton looks at every argument of a launch to find the code that it compiled for such arguments, which takes longer
    than the launch. What it looks at makes a short key here (strides, sizes, dtypes, alignment), and for a key that has
    been seen the compiled code is launched as it is.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[object, ...], Any] = {}
        self._can_repeat = can_repeat()

    def gather_queries(self, q: torch.Tensor, codes: torch.Tensor, out: torch.Tensor, heads_each: int) -> None:
        """Writes rows of `q` to `out`, each in the way its code says.

        Args:
            q: [rows, num_heads, head_dim], elements of a head side by side.
            codes: int32 [n], for each row of `out` the row of `q` and the way to lay it out; 16-byte aligned.
            out: [n, num_heads, head_dim] of `q`'s dtype, contiguous and aligned likewise.
            heads_each: query heads that share a KV head.
        """
        _, num_heads, head_dim = q.shape
        row_stride, head_stride, _ = q.stride()
        block = power_of_2(num_heads * head_dim, 2048)
        grid = (codes.shape[0], -(-num_heads * head_dim // block), 1)
        numbers = (row_stride, head_stride, num_heads, heads_each, head_dim, block)
        self._launch(_gather, grid, (q, out, codes, *numbers), (q.dtype, q.data_ptr() % 16, *numbers))

    def merge_parts(
        self,
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
            part_out: [parts, num_heads, head_dim], contiguous, laid out in either way. All tensors are 16-byte aligned.
            part_lse: float32, base 2, [parts, num_heads], laid out likewise.
            indptr: int32 [rows + 1], where the parts of each row of `out` begin in `codes`.
            codes: int32, row of `part_out` and the way it is laid out.
            out: [rows, num_heads, head_dim], contiguous; 0 for a row without parts.
            lse: float32, base 2, [rows, num_heads]; -inf for a row without parts.
            heads_each: query heads that share a KV head.
        """
        num_rows, num_heads, head_dim = out.shape
        dim_block = power_of_2(head_dim, 1024)
        head_block = power_of_2(num_heads, max(1, 1024 // dim_block))
        grid = (num_rows, -(-num_heads // head_block), 1)
        sizes = (num_heads, heads_each, head_dim, head_block, dim_block)
        self._launch(_merge, grid, (part_out, part_lse, indptr, codes, out, lse, *sizes), (out.dtype, *sizes))

    def copy_slots(self, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, most: int) -> None:
        """Copies the first slots of pages to other pages, keys and values of all layers in one launch.

        Args:
            keys: integers of the cache's bytes, strided [layers, pages, slots, heads, words], words side by side.
            values: likewise, with the same strides.
            table: int32 [3, copies]: source pages, destination pages, slots to copy. No page is both read and written.
            most: the most slots of a copy.
        """
        num_layers, _, _, num_heads, head_words = keys.shape
        num_words, num_copies = most * num_heads * head_words, table.shape[1]
        block = power_of_2(num_heads * head_words, 1024)
        grid = (num_copies, -(-num_words // block), 2 * num_layers)
        numbers = (*keys.stride()[:4], num_heads, head_words, block)
        key = (keys.dtype, keys.data_ptr() % 16, _kind(num_copies), *numbers)
        self._launch(_copy, grid, (keys, values, table, num_copies, *numbers), key)

    def append_rows(
        self,
        rows: tuple[torch.Tensor, torch.Tensor],
        caches: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
    ) -> None:
        """Writes keys and values to slots of pages.

        Args:
            rows: keys and values, [n, num_heads, head_dim] of the caches' dtype, elements of a head side by side.
            caches: of one layer, strided [pages, slots, heads, head_dim], both alike, elements side by side.
            places: int32 [2, n]: the page and the slot of each row; nothing is written for a page below 0.
        """
        keys, values = rows
        num_rows, num_heads, head_dim = keys.shape
        block = power_of_2(num_heads * head_dim, 1024)
        grid = (num_rows, -(-num_heads * head_dim // block), 1)
        strides = (*keys.stride()[:2], *values.stride()[:2], *caches[0].stride()[:3])
        numbers = (*strides, num_heads, head_dim, block)
        aligned = tuple(tensor.data_ptr() % 16 for tensor in (*rows, *caches))
        key = (keys.dtype, *aligned, _kind(num_rows), *numbers)
        self._launch(_append, grid, (*rows, *caches, places, num_rows, *numbers), key)

    def _launch(self, kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], key: Any) -> None:  # noqa: ANN401  Triton ships no types
        device = arguments[0].device
        key = (kernel.fn.__name__, device, *key)
        compiled = self._compiled.get(key)
        if compiled is not None:
            stream = driver.active.get_current_stream(device.index)
            try:  # as Triton itself does at the end of a launch, without hooks for profilers
                compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
                return
            except (AttributeError, TypeError):  # not the Triton that was looked at: nothing was launched
                self._can_repeat = False
                self._compiled.clear()
        found = kernel[grid](*arguments)
        if self._can_repeat:
            self._compiled[key] = found


#: versions of Triton in which what a launch returns can be launched again in this way
_LOOKED_AT = ("3.6",)


def can_repeat() -> bool:
    """Whether what a launch returns can be launched again as it is."""
    return str(triton.__version__).startswith(_LOOKED_AT)


def _kind(n: int) -> int:
    """What Triton compiles anew for in a number: 1, a multiple of 16, or any other."""
    return 1 if n == 1 else 16 if n % 16 == 0 else 0


def power_of_2(n: int, most: int) -> int:
    """The least power of two that is not below n; at most `most`, itself one."""
    return min(1 << (n - 1).bit_length(), most)
