"""Ids for the KV heads of a sequence, so that each head can be cached like a sequence of its own."""

from __future__ import annotations

import numpy as np
from attrs import define, field

from seqattn.errors import BadValueError

__all__ = ["HeadIDGenerator"]


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise BadValueError(f"{name} must be an integer, not {value!r}")
    return int(value)


def _positive(value: object) -> int:
    if (number := _integer("num_kv_heads", value)) < 1:
        raise BadValueError(f"num_kv_heads must be at least 1, not {value!r}")
    return number


@define(slots=True, frozen=True)
class HeadIDGenerator:
    """One id for each (sequence, KV head); no two pairs have the same id, whatever the number of heads.

        num_kv_heads 3      head 0  1  2
        sequence 0               0  1  2
        sequence 1               3  4  5

    Where the number of heads is a power of two the ids are those of seqattn 0.0.2.

    Attributes:
        num_kv_heads: KV heads of the model, at least 1.

    Raises:
        BadValueError: a number of heads below 1, or not an integer.
    """

    num_kv_heads: int = field(converter=_positive)

    def get_head_id(self, seq_id: int, head_idx: int) -> int:
        """The id of head `head_idx`, in [0, num_kv_heads), of sequence `seq_id`; O(1).

        Raises:
            BadValueError: an index out of that range, or an argument that is not an integer.
        """
        head = _integer("head_idx", head_idx)
        if not 0 <= head < self.num_kv_heads:
            raise BadValueError(f"head_idx {head_idx!r} is not in [0, {self.num_kv_heads})")
        return _integer("seq_id", seq_id) * self.num_kv_heads + head
