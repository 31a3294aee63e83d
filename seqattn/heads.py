"""Ids for the KV heads of a sequence, so that each head can be cached like a sequence of its own."""

from __future__ import annotations

from attrs import define, field

from seqattn.counts import is_int, positive
from seqattn.errors import BadValueError

__all__ = ["HeadIDGenerator"]


def _num_kv_heads(value: int) -> int:
    return positive("num_kv_heads", value)


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

    num_kv_heads: int = field(converter=_num_kv_heads)

    def get_head_id(self, seq_id: int, head_idx: int) -> int:
        """The id of head `head_idx`, in [0, num_kv_heads), of sequence `seq_id`; O(1).

        Raises:
            BadValueError: an index out of that range, or an argument that is not an integer.
        """
        if not is_int(seq_id):
            raise BadValueError(f"seq_id must be an integer, not {seq_id!r}: number the sequences")
        if not is_int(head_idx) or not 0 <= head_idx < self.num_kv_heads:
            raise BadValueError(f"head_idx must be an integer in [0, {self.num_kv_heads}), not {head_idx!r}")
        return int(seq_id) * self.num_kv_heads + int(head_idx)
