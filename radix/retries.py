"""Telling a request that is started again after preemption from a new one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

__all__ = ["Retries"]

_MOST = 4096


class Retries:
    """Remembers the aborted sequences, the last 4,096 of them, by id and a hash of their prompt."""

    def __init__(self) -> None:
        self.aborted: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()

    def remember(self, seq_id: Hashable, prompt: bytes) -> None:
        """A sequence was aborted; O(prompt)."""
        self.aborted[seq_id] = (len(prompt), hash(prompt))
        if len(self.aborted) > _MOST:
            self.aborted.popitem(last=False)

    def is_retry(self, seq_id: Hashable, prompt: bytes) -> bool:
        """Whether this id was aborted with a prompt that this one begins with; forgets the id."""
        found = self.aborted.pop(seq_id, None)
        return found is not None and len(prompt) >= found[0] and hash(prompt[: found[0]]) == found[1]
