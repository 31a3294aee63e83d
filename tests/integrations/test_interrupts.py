"""Interrupts anywhere in a step, as by Ctrl-C in a notebook: the steps after it give the answers of a run without."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from radix.integrations.transformers import Engine, Request, Sampling
from radix.integrations.transformers import flight as flights
from tests.integrations.models import check_all_free, engine_for, generated, prompt

pytest.importorskip("transformers", reason="needs the extra chat")

SYSTEM = prompt(1, 20)
#: every so many lines of the engine's own code; all of them take minutes, and pass
STRIDE = 37


class Interrupt:
    """Raises KeyboardInterrupt before the nth line of the engine's code that is run."""

    def __init__(self, nth: int) -> None:
        self.left = nth
        self.where = ""

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:  # noqa: ANN401  itself, or nothing
        own = frame.f_code.co_filename.startswith(flights.__file__.removesuffix("flight.py"))
        if not own:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def during(self, engine: Engine) -> bool:
        """Whether two steps are so long."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            engine.step()
            engine.step()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def started(*, run_ahead: bool) -> tuple[Engine, list[Request]]:
    engine = engine_for(run_ahead=run_ahead, num_pages=64)
    samplings = [Sampling(), Sampling(1.0, seed=3), Sampling()]
    return engine, [
        engine.submit(SYSTEM + prompt(40 + i, 3 + i), max_new_tokens=6 + 4 * i, stop_tokens=(), sampling=sampling)
        for i, sampling in enumerate(samplings)
    ]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 4, 8])
def test_nothing_is_lost_wherever_an_interrupt_comes(num_steps: int, run_ahead: bool) -> None:
    engine, requests = started(run_ahead=run_ahead)
    want = [request.tokens for request in engine.wait(requests)]
    nth = 1 + 5 * num_steps
    while True:
        engine, requests = started(run_ahead=run_ahead)
        for _ in range(num_steps):
            engine.step()
        late = engine.submit(prompt(70, 9), max_new_tokens=3, stop_tokens=())
        interrupt = Interrupt(nth)
        if not interrupt.during(engine):
            break
        for _ in range(60):
            if engine.num_running or engine.num_waiting:
                engine.step()
        assert [request.tokens for request in requests] == want, interrupt.where
        assert late.tokens == generated("Llama", late.prompt.tolist(), 3), interrupt.where
        check_all_free(engine)
        nth += STRIDE
    assert nth > 200
