"""Steps on their way: launched, and their tokens not read yet.

The tokens that a step chooses stay on the device as the input of the next one, which is launched before they are read.
What the CPU does for a step, so does it while the device computes the one before:

    step()      launch k + 1 ─ wait for tokens k ─ accept, end │ launch k + 2 ─ wait for tokens k + 1 ─ ...
    device      ██████████████ k ████████████████ ██████████████████ k + 1 ██████████████████ ██████████

So step k + 1 is launched before it is known who ends with step k. A row of a request that has ended is computed for
nothing; it writes to a slot behind all that was published of it. What is on its way can always be taken back: the next
step then computes the same, with the same numbers for what is drawn. This is also what follows any error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from attrs import define, evolve

from radix.integrations.transformers.sampling import choose_tokens
from seqattn.append import sent

if TYPE_CHECKING:
    from collections.abc import Callable

    from radix.integrations.transformers.request import Request
    from radix.integrations.transformers.runner import Runner
    from radix.integrations.transformers.scheduler import Batch, Scheduler

__all__ = ["Landed", "Steps"]


class Landed(NamedTuple):
    """What a step came to.

    Attributes:
        families: requests that have taken a token, the forks that begin with their first token behind each.
        now: by the engine's clock, seconds.
    """

    families: list[list[Request]]
    now: float


@define(slots=True, frozen=True, eq=False)
class _Flight:
    """A step that is launched.

    Attributes:
        batch: what it computes.
        families: those that get a token, each with the forks that begin with it.
        tokens: of all of these, int64 on the device.
        host: where they are copied to.
        copied: when they have been; None where the device is the CPU.
    """

    batch: Batch
    families: list[list[Request]]
    tokens: torch.Tensor
    host: torch.Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, batch: Batch, families: list[list[Request]], tokens: torch.Tensor) -> _Flight:
        """Of what was launched just now."""
        if tokens.device.type != "cuda":
            return cls(batch, families, tokens, tokens, None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(tokens.device))
        return cls(batch, families, tokens, host, copied)

    def read(self) -> list[int]:
        """Waits for the tokens."""
        if self.copied is not None:
            self.copied.synchronize()
        tokens: list[int] = self.host.tolist()
        return tokens


class Steps:
    """Launches steps, and lands them.

    Args:
        runner: the model.
        scheduler: what runs.
        clock: seconds.
        run_ahead: launch a step before the tokens of the one before are read.

    Attributes:
        runner, run_ahead: as given; may be changed between steps.
        num_ahead: steps that were launched so.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, clock: Callable[[], float], *, run_ahead: bool) -> None:
        self.runner = runner
        self.run_ahead = run_ahead
        self.num_ahead = 0
        self._scheduler = scheduler
        self._clock = clock
        self._flight: _Flight | None = None
        self._has_failed = False

    def next(self) -> Landed:
        """Computes a step, whose requests take their tokens; the step after it may be on its way.

        Raises:
            NoPageError: as `Scheduler.next_batch`.
            Whatever the model raises; requests stand where they stood, and steps on their way are taken back.
        """
        try:
            flight = self._flight or self._launch_next()
            if flight is None:
                return Landed([], self._clock())
            # After an error this one lands first: if the next one was the reason, that step is to say so.
            ahead = self._launch_after(flight) if self.run_ahead and not self._has_failed else None
            landed = self._land(flight, ahead)
        except BaseException:
            self._has_failed = True
            self.drop()
            raise
        self._has_failed = False
        return landed

    def has(self, request: Request) -> bool:
        """Whether a request is in a step that is on its way."""
        return self._flight is not None and request in self._flight.batch.requests

    def drop(self) -> None:
        """Takes back what is on its way."""
        self._flight = None
        self._scheduler.take_back()

    def forget_finished(self) -> None:
        """Forgets a step on its way of which nobody is left."""
        if self._flight is not None and all(request.is_finished for request in self._flight.batch.requests):
            self._flight = None

    def _launch_next(self) -> _Flight | None:
        batch = self._scheduler.next_batch()
        return self._launch(batch, None) if batch.requests else None

    def _launch_after(self, flight: _Flight) -> _Flight | None:
        """The step after one that is on its way."""
        batch = self._scheduler.batch_after(flight.batch)
        if batch is None:
            return None
        tokens = flight.tokens
        if len(batch.requests) < len(flight.batch.requests):
            rows = {request: row for row, request in enumerate(flight.batch.requests)}
            tokens = tokens[sent(np.array([rows[request] for request in batch.requests]), tokens.device)]
        found = self._launch(batch, tokens)
        self.num_ahead += 1
        return found

    def _launch(self, batch: Batch, tokens: torch.Tensor | None) -> _Flight:
        return self._chosen(batch, self.runner.forward(self.runner.prepare(batch, tokens)))

    def _chosen(self, batch: Batch, logits: torch.Tensor) -> _Flight:
        """The step with a token for each of its families, the requests of one of which share a row of logits."""
        families = _families(batch)
        requests = [request for family in families for request in family]
        if not requests:
            return _Flight.of(batch, families, torch.empty(0, dtype=torch.int64))
        if len(requests) > len(families):
            rows = [row for row, family in enumerate(families) for _ in family]
            logits = logits[sent(np.array(rows), logits.device)]
        nth = [len(request.tokens) + bool(batch.on_the_way) for request in requests]
        return _Flight.of(batch, families, choose_tokens(logits, [request.draw for request in requests], nth))

    def _land(self, flight: _Flight, ahead: _Flight | None) -> Landed:
        """Reads the tokens of a step, and gives them to its requests."""
        tokens = iter(flight.read())
        taken = {request: next(tokens) for family in flight.families for request in family}
        families = [family for family in flight.families if not family[0].is_finished]  # cancelled on the way
        if ahead is not None:
            self._scheduler.tell(ahead.batch, taken)
            ahead = evolve(ahead, batch=ahead.batch._replace(on_the_way=()))
        now = self._clock()
        self._scheduler.land(flight.batch, taken, now)
        self._flight = ahead
        return Landed(families, now)


def _families(batch: Batch) -> list[list[Request]]:
    """Those that get a token in a step, each with the forks that begin with it."""
    if batch.decodes:
        return [[request] for request in batch.requests]
    return [
        request.family()
        for request, size in zip(batch.requests, batch.num_new, strict=True)
        if request.num_done + size >= len(request.todo)
    ]
