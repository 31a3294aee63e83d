"""One launch for what a layer brings: new keys and values go to their pages, queries to where a graph reads them.

    q, keys, values ──▶ kernel ──▶ queries in fixed memory        row i of a batch padded to more rows
                              └──▶ key_cache, value_cache         page and slot of row i; nothing for a page below 0

In the layers of a model and from step to step only three pointers of such a launch change. So the code that Triton
compiled for the first one is launched as it is, with all other arguments made once, as long as shapes, strides and
alignment are the same.

Importing this file needs Triton, as `seqattn.kernels` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from seqattn.kernels import can_repeat, power_of_2

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RowTaker"]


@triton.jit  # type: ignore[untyped-decorator]  # Triton ships no types
def _take(  # type: ignore[no-untyped-def]  # and reads none but its own
    q,
    keys,
    values,
    fixed_q,
    key_cache,
    value_cache,
    places,
    num_rows,
    q_row_stride,
    q_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    num_qo_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    page = tl.load(places + row).to(tl.int64)
    slot = tl.load(places + num_rows + row).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    head, element = at // head_dim, at % head_dim
    source = row.to(tl.int64)
    inside = (at < num_qo_heads * head_dim) & (page >= 0)
    found = tl.load(q + source * q_row_stride + head * q_head_stride + element, mask=inside)
    tl.store(fixed_q + source * (num_qo_heads * head_dim) + at, found, mask=inside)
    inside = (at < num_kv_heads * head_dim) & (page >= 0)
    where = page * page_stride + slot * slot_stride + head * head_stride + element
    found = tl.load(keys + source * key_row_stride + head * key_head_stride + element, mask=inside)
    tl.store(key_cache + where, found, mask=inside)
    found = tl.load(values + source * value_row_stride + head * value_head_stride + element, mask=inside)
    tl.store(value_cache + where, found, mask=inside)


class RowTaker:
    """Launches the kernel for one layer.

    Args:
        fixed_q: where queries go, [num_rows, num_qo_heads, head_dim], contiguous.
        caches: keys and values of the layer, strided [pages, slots, num_kv_heads, head_dim], both alike, elements side
            by side; of the queries' dtype, and 16-byte aligned like `fixed_q`.
        places: int32 [2, num_rows], the page and the slot of each row; its memory is read by every launch.
    """

    __slots__ = ("_compiled", "_device", "_grid", "_rest", "_seen", "_sizes", "_tensors")

    def __init__(self, fixed_q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], places: torch.Tensor) -> None:
        num_rows, num_qo_heads, head_dim = fixed_q.shape
        block = power_of_2(num_qo_heads * head_dim, 1024)
        self._grid = (num_rows, -(-num_qo_heads * head_dim // block), 1)
        self._tensors = (fixed_q, *caches, places)
        self._sizes = (num_qo_heads, caches[0].shape[2], head_dim, block)
        self._device = fixed_q.device
        self._seen: tuple[tuple[int, ...], ...] | None = None
        self._compiled: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes rows, each strided [1, heads, rows, head_dim], of the caches' dtype.

        There may be fewer than `num_rows`; those that are not there must have pages below 0.
        """
        pointers = (q.data_ptr(), keys.data_ptr(), values.data_ptr())
        seen = (q.stride(), keys.stride(), values.stride())
        compiled = self._compiled
        aligned = not (pointers[0] | pointers[1] | pointers[2]) & 15
        if (
            compiled is not None
            and aligned
            and seen == self._seen
            and torch.cuda.current_device() == self._device.index
        ):
            stream = driver.active.get_current_stream(self._device.index)
            try:  # as Triton itself does at the end of a launch, without hooks for profilers
                compiled[0](*self._grid, stream, *compiled[1:], None, None, None, *pointers, *self._rest)
                return
            except (AttributeError, TypeError):  # not the Triton that was looked at: nothing was launched
                self._compiled = None
        self._launch((q, keys, values))

    def _launch(self, rows: tuple[torch.Tensor, ...]) -> None:
        rows = tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in rows)
        strides = [tensor.stride(axis) for tensor in rows for axis in (2, 1)]
        numbers = (self._grid[0], *strides, *self._tensors[1].stride()[:3])
        with torch.cuda.device(self._device):
            found = _take[self._grid](*rows, *self._tensors, *numbers, *self._sizes)
        if can_repeat() and not any(tensor.data_ptr() % 16 for tensor in (*rows, *self._tensors)):
            run: Callable[..., object] = found.run
            self._compiled = (run, found.function, found.packed_metadata)
            self._rest = (*(tensor.data_ptr() for tensor in self._tensors), *numbers, *self._sizes)
            self._seen = tuple(tensor.stride() for tensor in rows)
