"""Telling a request that is started again after preemption from a new one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

__all__ = ["Retries"]

_MOST = 4096
_ENDS = 256  # bytes


class Retries:
    """Remembers the aborted sequences, the last 4,096 of them, by id, length and ends of their prompt."""

    def __init__(self) -> None:
        self.aborted: OrderedDict[Hashable, tuple[Hashable, int, int]] = OrderedDict()

    def remember(self, seq_id: Hashable, namespace: Hashable, prompt: bytes | None) -> None:
        """A sequence was aborted that was started with this prompt, None if it was a fork; O(1)."""
        self.aborted.pop(seq_id, None)
        if prompt is not None:
            self.aborted[seq_id] = (namespace, len(prompt), _digest(prompt))
        if len(self.aborted) > _MOST:
            self.aborted.popitem(last=False)

    def is_retry(self, seq_id: Hashable, namespace: Hashable, prompt: bytes) -> bool:
        """Whether this id was aborted with a prompt of that namespace that this one begins with; forgets the id."""
        found = self.aborted.pop(seq_id, None)
        if found is None or len(prompt) < found[1]:
            return False
        same_namespace = found[0] is namespace or found[0] == namespace  # a NaN equals nothing, but is itself
        return same_namespace and _digest(prompt[: found[1]]) == found[2]


def _digest(prompt: bytes) -> int:
    """A hash of the prompt's first and last tokens: enough to tell requests of one id apart, whatever their length."""
    return hash((prompt[:_ENDS], prompt[-_ENDS:]))
