"""The requests of an engine that have not ended: their ids, and where each has its place.

An open request is in the inbox, waits, runs, or is a fork that begins with the first token of another. While a step, a
fork or an end is under way it may be between two of these; an interrupt can leave it there.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from seqattn.errors import DuplicateSequenceError, SeqAttnError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from radix.integrations.transformers.request import Request
    from radix.integrations.transformers.scheduler import Scheduler

__all__ = ["OpenRequests"]


class OpenRequests:
    """Open requests by their ids; any thread may call `next_id` and `enter`.

    Args:
        name: requests without an id get the ids "NAME 0", "NAME 1", …
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._count = itertools.count()
        self._by_id: dict[Hashable, Request] = {}

    def next_id(self) -> tuple[int, str]:
        """A place in the order of submission, and an id that none of them has."""
        while True:
            number = next(self._count)
            if (own_id := f"{self.name} {number}") not in self._by_id:
                return number, own_id

    def enter(self, request: Request) -> None:
        """Adds a request; raises DuplicateSequenceError if another open one has its id."""
        if self._by_id.setdefault(request.id, request) is not request:  # at once, as any thread may submit
            raise DuplicateSequenceError(request.id, "waits already: use another id")

    def leave(self, request: Request) -> None:
        """It has ended."""
        self._by_id.pop(request.id, None)

    def has(self, request: Request) -> bool:
        """Whether a request is one of these."""
        return self._by_id.get(request.id) is request

    def refuse_foreign(self, request: Request) -> None:
        """Raises SeqAttnError if a request is not one of these."""
        if not self.has(request):
            raise SeqAttnError(f"{request.id!r} is no request of this engine")

    def gather(self, scheduler: Scheduler) -> list[Request]:
        """Lets each that has no place wait, after an error or interrupt; returns those that are finished.

        Args:
            scheduler: of the engine, after `take_back`.
        """
        for request in [each for each in scheduler.running if not scheduler.is_sequence(each)]:
            scheduler.running.remove(request)
        known = list(self._by_id.values())
        for request in known:  # forks with a token have begun
            request.forks = [fork for fork in request.forks if not fork.tokens and not fork.is_finished]
        placed = {*scheduler.inbox, *scheduler.waiting, *scheduler.running}
        placed.update(fork for request in known for fork in request.forks)
        for request in known:
            if request not in placed and not request.is_finished:
                if scheduler.is_sequence(request):
                    scheduler.cache.abort(request.id)
                request.todo, request.num_done = request.all_tokens, 0
                scheduler.waiting.append(request)
        return [request for request in known if request.is_finished]
