"""Pins hold pages that requests need: who can run runs, what is only kept for later gives way, nothing is lost."""

from __future__ import annotations

import pytest

from seqattn.errors import NoPageError
from tests.integrations.models import check_all_free, engine_for, generated, prompt

pytest.importorskip("transformers", reason="needs the extra chat")


def test_when_pins_hold_the_pages_the_engine_says_so_and_loses_nothing() -> None:
    engine = engine_for(num_pages=8)
    engine.generate([prompt(1, 50)], max_new_tokens=1)
    request = engine.submit(prompt(2, 20), max_new_tokens=2)
    with engine.cache.pin(prompt(1, 50)):
        with pytest.raises(NoPageError):
            engine.step()
        assert (engine.num_waiting, engine.num_running) == (1, 0)
    assert engine.wait([request])[0].tokens == generated("Llama", prompt(2, 20), 2)
    check_all_free(engine)


def test_who_needs_fewer_pages_than_pins_leave_runs_before_who_needs_more() -> None:
    engine = engine_for(num_pages=8)
    engine.generate([prompt(1, 40)], max_new_tokens=1)
    big = engine.submit(prompt(2, 30), max_new_tokens=2)
    with engine.cache.pin(prompt(1, 40)):
        for small in engine.generate([prompt(3, 6), prompt(4, 7)], max_new_tokens=2, stop_tokens=()):
            assert small.tokens == generated("Llama", small.prompt.tolist(), 2)
        assert (engine.num_waiting, engine.num_running) == (1, 0)
        with pytest.raises(NoPageError):
            engine.step()
    assert engine.wait([big])[0].tokens == generated("Llama", prompt(2, 30), 2)
    check_all_free(engine)


def test_what_is_kept_for_later_gives_way_only_while_nothing_runs() -> None:
    engine = engine_for(num_pages=8)
    engine.generate([prompt(1, 25)], max_new_tokens=1)
    pins = [engine.cache.pin(prompt(1, 25))]
    pins[0].__enter__()
    asked: list[int] = []

    def let_go() -> bool:
        asked.append(engine.num_running)
        if pins:
            pins.pop().__exit__(None, None, None)
            return True
        return False

    engine.on_short.append(let_go)
    requests = [engine.submit(prompt(i, n), max_new_tokens=2, stop_tokens=()) for i, n in ((2, 20), (3, 40))]
    engine.step()
    assert (engine.num_running, asked) == (1, []), "the second waits for the first"
    engine.wait(requests)
    assert asked == [0]
    for request in requests:
        assert request.tokens == generated("Llama", request.prompt.tolist(), 2)
    check_all_free(engine)
