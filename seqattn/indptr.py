"""Offsets into flat lists: the checks that packed data shares, and the lengths that follow from them.

An indptr says where each entry of a flat list begins, and where the last one ends:

    indptr         [0 4 4 5]     entry i has pages indptr[i] to indptr[i + 1]: here 4, none and 1
    last_page_len  [10 0 5]      page_size 16: 58, none and 5 tokens

The numbers are those of invariants B1 and B2, which `seqattn.packed` states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seqattn.errors import BadValueError, InvariantError, LengthError, TensorError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["as_invariant", "group_lengths", "to_numpy", "validate_indptr", "validate_last", "validate_pages"]


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's values: a view if it is on the CPU, otherwise a copy that waits for the device."""
    try:
        values: npt.NDArray[Any] = tensor.numpy()
    except (RuntimeError, TypeError):  # it is elsewhere, or needs a gradient
        values = tensor.detach().cpu().numpy()
    return values


def group_lengths(indptr: npt.NDArray[Any], last: npt.NDArray[Any], page_size: int) -> npt.NDArray[np.int64]:
    """Tokens of each entry, int64 [entries], from its number of pages and its last_page_len."""
    full = np.maximum(np.diff(indptr).astype(np.int64) - 1, 0)
    lengths: npt.NDArray[np.int64] = full * page_size + last
    return lengths


def validate_pages(indices: torch.Tensor, indptr: torch.Tensor, last_page_len: torch.Tensor) -> None:
    """Refuses page numbers and an indptr that break B1; O(pages). Raises TensorError or LengthError."""
    _validate_vector("kv_page_indices", indices)
    _validate_vector("kv_last_page_len", last_page_len)
    end = validate_indptr("kv_page_indptr", indptr, len(last_page_len))
    if end != len(indices):
        raise LengthError(f"kv_page_indptr ends at {end} but there are {len(indices)} page numbers")
    if len(indices) and (low := int(to_numpy(indices).min())) < 0:
        raise LengthError(f"kv_page_indices holds {low}: page numbers start at 0")


def validate_indptr(name: str, tensor: torch.Tensor, num_entries: int) -> int:
    """Refuses an indptr that is not as drawn above; returns where it ends. Raises TensorError or LengthError."""
    _validate_vector(name, tensor)
    indptr = to_numpy(tensor)
    if len(indptr) != num_entries + 1:
        raise LengthError(f"{name} has {len(indptr)} offsets for {num_entries} entries: it must have one more")
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise LengthError(f"{name} must start at 0 and never decrease, not {indptr.tolist()}")
    return int(indptr[-1])


def validate_last(indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int | None) -> None:
    """Refuses values that break B2, after `validate_pages`; no upper bound without a page size. Raises LengthError."""
    last, num_pages = to_numpy(last_page_len), np.diff(to_numpy(indptr))
    most = np.iinfo(np.int32).max if page_size is None else page_size
    wrong = np.flatnonzero(np.where(num_pages > 0, (last < 1) | (last > most), last != 0))
    if len(wrong):
        i = int(wrong[0])
        bounds = f"in [1, {'page_size' if page_size is None else page_size}]" if num_pages[i] else "0"
        raise LengthError(f"kv_last_page_len[{i}] is {last[i]} for {num_pages[i]} pages: it must be {bounds}")


@contextmanager
def as_invariant(name: str, drawing: str = "") -> Iterator[None]:
    """What is refused inside is a broken invariant of that name."""
    try:
        yield
    except BadValueError as error:
        raise InvariantError(name, str(error), drawing) from error


def _validate_vector(name: str, tensor: torch.Tensor) -> None:
    # Callers without type checks pass lists and arrays.
    given: object = tensor
    if not isinstance(given, torch.Tensor) or given.dtype != torch.int32 or given.ndim != 1:
        seen = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
        raise TensorError(f"{name} must be an int32 tensor with one axis, not {seen}: kernels read other types wrongly")
