"""What an interrupt or an error has left of an engine's requests, brought back to a state that steps go on from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from radix.integrations.transformers.request import Request
    from radix.integrations.transformers.scheduler import Scheduler

__all__ = ["gather"]


def gather(scheduler: Scheduler, open_requests: Iterable[Request]) -> list[Request]:
    """Lets every open request wait that was on its way between two places; returns those that are finished.

    Args:
        scheduler: after `take_back`.
        open_requests: those that have not ended.
    """
    for request in [each for each in scheduler.running if not scheduler.is_sequence(each)]:
        scheduler.running.remove(request)
    known = list(open_requests)
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
