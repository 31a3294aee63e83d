"""Reading a request piece by piece, and ending it from a task that may be cancelled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from radix.integrations.transformers.request import Piece, Request
from radix.integrations.transformers.text import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Reader", "surely"]


async def surely(call: Callable[[Request], None], request: Request) -> None:
    """Makes a call in a thread, whatever is cancelled meanwhile.

    `asyncio.to_thread` is a coroutine: behind `asyncio.shield` it is a task, which a loop that ends cancels, perhaps
    before a thread has taken the call. A future of the executor is no task.
    """
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, call, request))


class Reader:
    """What one consumer has seen of a request; any number may read the same one.

    Attributes:
        request: what is read.
        num_seen: tokens that were read.
        is_done: whether the request was finished when it was read last.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.num_seen = 0
        self.is_done = False
        self._num_sent = 0
        stops = request.watch.stops if request.watch else ()
        self._stream = TextStream(request.tokenizer, stops) if request.tokenizer is not None else None

    def read(self) -> Iterator[Piece]:
        """What is new, as one piece or none."""
        is_last = self.request.is_finished  # looked at first: no token comes after that
        tokens = self.request.tokens[self.num_seen :]
        self.num_seen += len(tokens)
        text = ""
        if self._stream is not None:
            self._stream.push(tokens, is_last=is_last)
            end = self._stream.certain() if not is_last else len(self._stream.text[: self._stream.stop])
            text, self._num_sent = self._stream.text[self._num_sent : end], max(end, self._num_sent)
        self.is_done = is_last
        if tokens or text:
            yield Piece(tokens, text)
