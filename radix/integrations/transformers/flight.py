"""Steps on their way: launched, and their tokens not read yet.

The tokens that a step chooses stay on the device as the input of the next one, which is launched before they are read.
What the CPU does for a step, so does it while the device computes the one before:

    step()      launch k + 1 ─ wait for tokens k ─ accept, end │ launch k + 2 ─ wait for tokens k + 1 ─ ...
    device      ██████████████ k ████████████████ ██████████████████ k + 1 ██████████████████ ██████████

So step k + 1 is launched before it is known who ends with step k. A row of a request that has ended is computed for
nothing; it writes to a slot behind all that was published of it. A flight can always be taken back: the next step then
computes the same, with the same numbers for what is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import define, evolve

from radix.integrations.transformers.sampling import choose_tokens
from seqattn.append import sent

if TYPE_CHECKING:
    from radix.integrations.transformers.request import Request
    from radix.integrations.transformers.runner import Runner
    from radix.integrations.transformers.scheduler import Batch, Scheduler

__all__ = ["Landed", "Steps"]

#: a request and its next token, the forks that begin with its first token behind it
Landed = list[list[tuple["Request", int]]]


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
        run_ahead: launch a step before the tokens of the one before are read.

    Attributes:
        runner, run_ahead: as given; may be changed between steps.
        num_ahead: steps that were launched so.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, *, run_ahead: bool) -> None:
        self.runner = runner
        self.run_ahead = run_ahead
        self.num_ahead = 0
        self._scheduler = scheduler
        self._flight: _Flight | None = None
        self._has_failed = False

    def next(self) -> Landed:
        """The tokens of one step, to be accepted; the step after it may be on its way.

        Raises:
            NoPageError: as `Scheduler.next_batch`.
            Whatever the model raises. A step that was launched before that stays on its way.
        """
        flight = self._flight
        if flight is None or all(request.is_finished for request in flight.batch.requests):
            self._flight = None
            batch = self._scheduler.next_batch()
            if not batch.requests:
                return []
            flight = self._launch(batch, None)
        self._flight = flight  # should the next one fail
        ahead = None
        if self.run_ahead and not self._has_failed:
            self._has_failed = True
            ahead = self._launch_after(flight)
        self._has_failed = False
        return self._land(flight, ahead)

    def drop(self) -> None:
        """Takes back a step that is on its way."""
        if self._flight is not None:
            self._scheduler.undo(self._flight.batch)
            self._flight = None

    def _launch(self, batch: Batch, tokens: torch.Tensor | None) -> _Flight:
        try:
            logits = self.runner.forward(self.runner.prepare(batch, tokens))
            families = _families(batch)
            return _Flight.of(batch, families, self._choose(logits, families, 1 if batch.on_the_way else 0))
        except BaseException:
            self._scheduler.undo(batch)
            raise

    def _launch_after(self, flight: _Flight) -> _Flight | None:
        """The step after one that is on its way."""
        batch = self._scheduler.batch_after(flight.batch)
        if batch is None:
            return None
        tokens = flight.tokens
        if len(batch.requests) < len(flight.batch.requests):
            rows = {request: row for row, request in enumerate(flight.batch.requests)}
            tokens = tokens[sent(np.array([rows[request] for request in batch.requests]), tokens.device)]
        self.num_ahead += 1
        return self._launch(batch, tokens)

    def _choose(self, logits: torch.Tensor, families: list[list[Request]], nth: int) -> torch.Tensor:
        """A token for each of `families`, the requests of one of which share a row of logits."""
        draws = [request.draw for family in families for request in family]
        if not draws:
            return torch.empty(0, dtype=torch.int64)
        if len(draws) > len(families):
            rows = [row for row, family in enumerate(families) for _ in family]
            logits = logits[sent(np.array(rows), logits.device)]
        return choose_tokens(logits, draws, nth)

    def _land(self, flight: _Flight, ahead: _Flight | None) -> Landed:
        """Reads the tokens of a step."""
        self._flight = None
        try:
            tokens = iter(flight.read())
        except BaseException:
            for each in (ahead, flight):
                if each is not None:
                    self._scheduler.undo(each.batch)
            raise
        self._scheduler.done(flight.batch)
        landed = [[(request, next(tokens)) for request in family] for family in flight.families]
        if ahead is not None:
            self._scheduler.tell(ahead.batch, {request: token for family in landed for request, token in family})
            batch = ahead.batch._replace(on_the_way=())
            self._flight = evolve(ahead, batch=batch)
        return [family for family in landed if not family[0][0].is_finished]  # cancelled on the way


def _families(batch: Batch) -> list[list[Request]]:
    """Those that get a token in a step, each with the forks that begin with it."""
    if batch.decodes:
        return [[request] for request in batch.requests]
    return [
        request.family()
        for request, size in zip(batch.requests, batch.num_new, strict=True)
        if request.num_done + size >= len(request.todo)
    ]
