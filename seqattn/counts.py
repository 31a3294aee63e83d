"""Checking numbers that callers give."""

from __future__ import annotations

import numpy as np

from seqattn.errors import BadValueError, LengthError

__all__ = ["as_count", "is_int", "positive"]


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
