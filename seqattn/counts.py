"""Checking numbers that callers give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from seqattn.errors import BadValueError, LengthError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = ["as_count", "is_int", "one_integer_each", "positive"]


def is_int(value: object) -> bool:
    """Whether a value is an integer, of Python or numpy; a bool is not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def positive(name: str, value: int) -> int:
    """`value` as an int of at least 1; raises BadValueError for anything else."""
    if not is_int(value) or value < 1:
        raise BadValueError(f"{name} must be an integer of at least 1, not {value!r}")
    return int(value)


def as_count(name: str, value: int, least: int = 0) -> int:
    """`value` as an int of at least `least`.

    Raises:
        LengthError: it is smaller, or not an integer.
    """
    if type(value) is int and value >= least:
        return value
    if not is_int(value) or value < least:
        raise LengthError(f"{name} must be an integer of at least {least}, not {value!r}")
    return int(value)


def one_integer_each(
    name: str, values: Sequence[int] | npt.NDArray[np.integer], num_sequences: int
) -> npt.NDArray[np.int64]:
    """One integer for each of so many sequences, int64 [num_sequences]; LengthError for anything else."""
    try:
        array: npt.NDArray[Any] = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.empty((0, 0))
    is_int64 = np.can_cast(array.dtype, np.int64)
    if array.shape != (num_sequences,) or (not (is_int64 and array.dtype.kind in "iu") and num_sequences):
        raise LengthError(f"{name} must be one integer for each of {num_sequences} sequences, not {values!r}")
    return array.astype(np.int64, copy=False)
