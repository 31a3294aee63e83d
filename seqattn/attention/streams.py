"""Calls of one step at the same time, on three CUDA streams.

first     ── call 0 ─────────────┐            goes before the others
between   ── calls 1, 2 … ───────┤            then these
caller's  ── the last call ──────┴─▶ goes on when all are done
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Streams"]


class Streams:
    """The streams beside the caller's on a device."""

    def __init__(self, device: torch.device) -> None:
        self._index = device.index
        self._sides = [torch.cuda.Stream(device, priority=priority) for priority in (-2, -1)]  # type: ignore[no-untyped-call]
        with torch.inference_mode(mode=False):  # it is written outside of it, too
            self._pause = torch.zeros(1, device=device)
        self._events = tuple(torch.cuda.Event() for _ in range(4))  # type: ignore[no-untyped-call]

    def run(self, num_calls: int, call: Callable[[int], None], *, pause: bool) -> None:
        """Makes calls 0 to `num_calls - 1`, at least two, each on its stream; the caller's stream waits for all.

        Args:
            num_calls: how many.
            call: makes one on the current stream.
            pause: the last call begins a little later, so that the blocks of the first get their multiprocessors.
        """
        main, last, is_back = torch.cuda.current_stream(self._index), num_calls - 1, False
        (first, between), (begun, later, first_done, between_done) = self._sides, self._events
        used = [(first, first_done)]
        begun.record(main)
        if pause:
            self._pause.zero_()
        if last > 1:
            later.record(main)
        try:
            first.wait_event(begun)
            torch.cuda.set_stream(first)
            call(0)
            if last > 1:
                used.append((between, between_done))
                between.wait_event(later)
                torch.cuda.set_stream(between)
                for i in range(1, last):
                    call(i)
            torch.cuda.set_stream(main)
            is_back = True
            call(last)
        finally:
            if not is_back:
                torch.cuda.set_stream(main)
            # Also where a call raises: what was launched uses memory that the caller's stream may be given next.
            for stream, done in used:
                done.record(stream)
                main.wait_event(done)
