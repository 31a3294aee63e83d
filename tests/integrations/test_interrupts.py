"""Interrupts anywhere in a step, as by Ctrl-C in a notebook: the steps after it give the answers of a run without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from types import FrameType
from typing import Any

import pytest

from radix.integrations.transformers import Engine, Request, Sampling
from radix.integrations.transformers import flight as flights
from seqattn import DuplicateSequenceError
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

    def during(self, call: Callable[[], object]) -> bool:
        """Whether a call is so long."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def started(*, run_ahead: bool, max_requests: int = 8) -> tuple[Engine, list[Request]]:
    engine = engine_for(run_ahead=run_ahead, num_pages=64, max_requests=max_requests)
    samplings = [Sampling(), Sampling(1.0, seed=3), Sampling()]
    return engine, [
        engine.submit(SYSTEM + prompt(40 + i, 3 + i), max_new_tokens=6 + 4 * i, stop_tokens=(), sampling=sampling)
        for i, sampling in enumerate(samplings)
    ]


@cache
def answers() -> list[list[int]]:
    """Of the requests that are started, without interrupts."""
    engine, requests = started(run_ahead=False)
    return [request.tokens for request in engine.wait(requests)]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 4, 8])
def test_nothing_is_lost_wherever_an_interrupt_comes(num_steps: int, run_ahead: bool) -> None:
    want = answers()
    nth = 1 + 5 * num_steps
    while True:
        engine, requests = started(run_ahead=run_ahead)
        for _ in range(num_steps):
            engine.step()
        late = engine.submit(prompt(70, 9), max_new_tokens=3, stop_tokens=())
        interrupt = Interrupt(nth)
        if not interrupt.during(lambda engine=engine: (engine.step(), engine.step())):  # type: ignore[misc]
            break
        for _ in range(60):
            if engine.num_running or engine.num_waiting:
                engine.step()
        assert [request.tokens for request in requests] == want, interrupt.where
        assert late.tokens == generated("Llama", late.prompt.tolist(), 3), interrupt.where
        check_all_free(engine)
        nth += STRIDE
    assert nth > 200


CALLS: dict[str, Callable[[Engine, list[Request]], object]] = {
    "cancel what runs": lambda engine, requests: engine.cancel(requests[1]),
    "cancel what waits": lambda engine, requests: engine.cancel(requests[2]),
    "fork": lambda engine, requests: engine.fork(requests[0], sampling=Sampling()),
    "close": lambda engine, _: engine.close(),
}


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("name", list(CALLS))
def test_nothing_is_lost_where_an_interrupt_comes_between_steps(name: str, num_steps: int, run_ahead: bool) -> None:
    nth = 1
    while True:
        engine, requests = started(run_ahead=run_ahead, max_requests=2)
        for _ in range(num_steps):
            engine.step()
        interrupt = Interrupt(nth)
        if not interrupt.during(partial(CALLS[name], engine, requests)):
            break
        for _ in range(60):
            if name != "close" and (engine.num_running or engine.num_waiting):
                engine.step()
        for request, answer in zip(requests, answers(), strict=True):
            if name != "close" and request.finish_reason != "cancelled":
                assert request.tokens == answer, interrupt.where
        engine.close()
        assert all(request.is_finished for request in requests), interrupt.where
        check_all_free(engine)
        again = [engine.submit(prompt(9, 5), max_new_tokens=1, request_id=request.id) for request in requests]
        assert all(request.tokens for request in engine.wait(again)), interrupt.where
        nth += 3
    assert nth > 10


@pytest.mark.parametrize(("is_stream", "stride"), [(False, 1), (True, 11)])
def test_an_interrupt_while_a_prompt_is_queued_or_streamed_leaves_nothing_of_it(is_stream: bool, stride: int) -> None:
    engine, requests = started(run_ahead=False)
    engine.step()
    call = (lambda *given, **named: list(engine.stream(*given, **named))) if is_stream else engine.submit
    queue = partial(call, prompt(70, 9), max_new_tokens=3, stop_tokens=(), request_id="new")
    nth = 1
    while (interrupt := Interrupt(nth)).during(queue):  # the same id again and again
        if is_stream:
            engine.step()  # ends what an interrupt came before
        queued = (*engine.scheduler.inbox, *engine.scheduler.waiting, *engine.scheduler.running)
        assert "new" not in [request.id for request in queued], interrupt.where
        nth += stride
    assert nth > 20
    assert [request.tokens for request in engine.wait(requests)] == answers()
    engine.close()
    check_all_free(engine)


class Once:
    """A method that raises KeyboardInterrupt at its first call, before or after what it does."""

    def __init__(self, method: Any, *, after: bool) -> None:  # noqa: ANN401  any
        self.method, self.after, self.is_done = method, after, False

    def __call__(self, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401  whatever it takes
        if self.is_done:
            return self.method(*arguments, **named)
        self.is_done = True
        if self.after:
            self.method(*arguments, **named)
        raise KeyboardInterrupt


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", ["abort", "publish", "finish", "fork", "start", "extend", "truncate"])
@pytest.mark.parametrize("run_ahead", [False, True])
def test_forks_and_preempted_requests_are_not_lost_in_calls_of_the_cache(
    what: str, after: bool, run_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(run_ahead=run_ahead, num_pages=9)
    first = engine.submit(SYSTEM, max_new_tokens=20, stop_tokens=())
    requests = [first, *(engine.fork(first, sampling=Sampling()) for _ in range(2))]
    requests.append(engine.submit(prompt(70, 9), max_new_tokens=20, stop_tokens=()))
    once = Once(getattr(engine.cache, what), after=after)
    monkeypatch.setattr(engine.cache, what, once)
    for _ in range(400):
        if all(request.is_finished for request in requests):
            break
        with suppress(KeyboardInterrupt):
            engine.step()
    engine.step()  # lets go of what an interrupt came before
    for request in requests:
        assert request.tokens == generated("Llama", request.prompt.tolist(), 20)
    assert once.is_done or what == "truncate"
    check_all_free(engine)


@pytest.mark.parametrize("run_ahead", [False, True])
def test_an_engine_is_closed_after_an_interrupt_at_the_last_token(
    run_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, requests = started(run_ahead=run_ahead)
    once = Once(Request.read, after=False)
    monkeypatch.setattr(Request, "read", lambda request: once(request))  # noqa: PLW0108  a method binds
    options = {"max_new_tokens": 1, "stop_tokens": ()}
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt(5, 4)], **options)  # type: ignore[arg-type]
    monkeypatch.setattr(engine.cache, "finish", Once(engine.cache.finish, after=True))
    with pytest.raises(KeyboardInterrupt):
        engine.wait(requests)
    engine.close()
    assert all(request.is_finished for request in requests)
    check_all_free(engine)


def test_an_id_that_runs_elsewhere_is_left_alone() -> None:
    engine = engine_for()
    engine.cache.start("x", prompt(1, 9))
    other = engine_for()
    other_request = engine.submit(prompt(2, 5), max_new_tokens=2, stop_tokens=(), request_id="y")
    engine.cache.start("y", prompt(3, 9))
    with pytest.raises(DuplicateSequenceError):
        engine.step()
    assert engine.cache.descriptor.num_tokens("y") == 9
    engine.cache.abort("y")
    engine.wait([other_request])
    assert other_request.tokens == generated("Llama", prompt(2, 5), 2)
    other.close()
