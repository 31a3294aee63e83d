"""The small kernels around attention, launched before what goes ahead of them has ended.

A kernel launched in this way (programmatic dependent launch, from Hopper on) gets its multiprocessors as soon as all
blocks ahead of it have ended, or have said that it may begin, as those of flashinfer's fa2 and decode kernels do.
Before it reads or writes anything it waits until they are done and what they wrote can be seen. So only its launch may
take less time. In a captured graph that is so for all kernels ahead of it (all its edges are programmatic), in a launch
without a graph for the one ahead of it on its own stream.

Importing this file needs Triton, as `seqattn.kernels` does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import triton
import triton.language as tl
from attrs import frozen

from seqattn import kernels
from seqattn.kernels import _gather, _merge

__all__ = ["gathering_early", "merging_early"]


@triton.jit  # type: ignore[untyped-decorator]  # Triton ships no types
def _gather_early(  # type: ignore[no-untyped-def]  # and reads none but its own
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
    tl.extra.cuda.gdc_wait()
    _gather(q, out, codes, row_stride, head_stride, num_heads, heads_each, head_dim, block)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _merge_early(  # type: ignore[no-untyped-def]  # as above
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
    tl.extra.cuda.gdc_wait()
    _merge(part_out, part_lse, indptr, codes, out, lse, num_heads, heads_each, head_dim, head_block, dim_block)


@frozen
class _Early:
    """In the place of a kernel: one that is launched early."""

    kernel: Any

    @property
    def fn(self) -> Any:  # noqa: ANN401  Triton ships no types
        """Its function, by whose name the launcher knows what it compiled."""
        return self.kernel.fn

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def launch(*arguments: object) -> Any:  # noqa: ANN401  as above
            return self.kernel[grid](*arguments, launch_pdl=True)

        return launch


def gathering_early() -> AbstractContextManager[object]:
    """Meanwhile, queries are gathered by a kernel that is launched early."""
    return patch.multiple(kernels, _gather=_Early(_gather_early))


def merging_early() -> AbstractContextManager[object]:
    """Meanwhile, results are merged by a kernel that is launched early."""
    return patch.multiple(kernels, _merge=_Early(_merge_early))
