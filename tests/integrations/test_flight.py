"""Steps launched before the tokens of the one before are read: the same answers, and nothing lost on the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from radix.integrations.transformers import Engine, Request, Sampling
from radix.integrations.transformers import flight as flights
from tests.integrations.models import check_all_free, engine_for, generated, prompt

pytest.importorskip("transformers", reason="needs the extra chat")

SYSTEM = prompt(1, 20)


def tokens_of(run_ahead: bool, **options: Any) -> list[list[int]]:  # noqa: ANN401  of the engine
    """Answers of different lengths, greedy and drawn, some ended by a token."""
    engine = engine_for(run_ahead=run_ahead, **options)
    requests = []
    for i in range(8):
        sampling = Sampling(temperature=1.2, top_p=0.9, seed=i) if i % 2 else Sampling()
        stops = [i + 20] if i % 3 else None
        ids = SYSTEM + prompt(30 + i, 1 + i)
        requests.append(engine.submit(ids, max_new_tokens=5 + 6 * i, sampling=sampling, stop_tokens=stops))
        engine.step()
    engine.wait(requests)
    assert (engine.steps.num_ahead > 0) == run_ahead
    check_all_free(engine)
    return [request.tokens for request in requests]


@pytest.mark.parametrize("options", [{}, {"graph_sizes": (8,)}, {"packing": "plain"}, {"num_pages": 14}], ids=str)
def test_answers_are_those_of_steps_one_by_one(options: dict[str, Any]) -> None:
    assert tokens_of(True, **options) == tokens_of(False, **options)


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, log = engine_for(run_ahead=True), []
    forward, read = engine.runner.forward, flights._Flight.read
    monkeypatch.setattr(engine.runner, "forward", lambda step: log.append("launch") or forward(step))  # type: ignore[func-returns-value]
    monkeypatch.setattr(flights._Flight, "read", lambda flight: log.append("read") or read(flight))  # type: ignore[func-returns-value]
    engine.generate([prompt(1, 9)], max_new_tokens=5, stop_tokens=())
    assert log == ["launch", *["launch", "read"] * 4, "read"], "prompts, too; the last is known to be the last"
    assert engine.steps.num_ahead == 4


def running(
    num_requests: int = 3,
    *,
    num_steps: int = 3,
    most: int = 30,
    **options: Any,  # noqa: ANN401  of the engine
) -> tuple[Engine, list[Request]]:
    """An engine with a step on its way."""
    engine = engine_for(run_ahead=True, **options)
    prompts = [SYSTEM + prompt(40 + i, 3 + i) for i in range(num_requests)]
    requests = [engine.submit(ids, max_new_tokens=most, stop_tokens=()) for ids in prompts]
    for _ in range(num_steps):
        engine.step()
    assert engine.steps._flight is not None
    engine.cache.check()
    return engine, requests


def expect(*requests: Request) -> None:
    for request in requests:
        assert request.tokens
        assert request.tokens == generated("Llama", request.prompt.tolist(), len(request.tokens))


def test_the_newest_token_of_a_sequence_is_that_of_its_request() -> None:
    engine, requests = running()
    for _ in range(20):
        engine.step()
        for request in requests:
            num_tokens = len(request.prompt) + len(request.tokens)
            run = engine.cache.state.running[request.id]
            assert run.num_ids == num_tokens, "its newest token is in the step on its way"
            assert run.key(num_tokens) == request.all_tokens.tobytes()
    expect(*requests)


def test_who_is_cancelled_on_the_way_gets_nothing_more() -> None:
    engine, requests = running()
    before, num_done = requests[0].tokens[:], requests[0].num_done
    engine.cancel(requests[0])
    assert engine.cache.match(requests[0].prompt).num_tokens == len(requests[0].prompt)
    assert engine.step() == requests[1:]
    assert (requests[0].tokens, requests[0].num_done) == (before, num_done)
    engine.wait(requests)
    expect(*requests)
    check_all_free(engine)


def test_a_step_of_which_nobody_is_left_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, requests = running()
    for request in requests:
        engine.cancel(request)
    monkeypatch.setattr(flights._Flight, "read", lambda _: pytest.fail("nobody wants its tokens"))
    assert engine.step() == []
    monkeypatch.undo()
    assert engine.generate([SYSTEM], max_new_tokens=6)[0].tokens == generated("Llama", SYSTEM, 6)
    check_all_free(engine)


def test_who_joins_does_so_when_the_step_on_its_way_has_landed() -> None:
    engine, requests = running()
    late = engine.submit(prompt(50, 8), max_new_tokens=4, stop_tokens=())
    assert engine.step() == requests
    assert engine.step() == [*requests, late]
    engine.wait([*requests, late])
    expect(*requests)


def test_a_fork_stands_where_its_parent_stands_and_the_step_on_its_way_is_taken_back() -> None:
    engine, requests = running(num_steps=6)
    drawn = engine.submit(prompt(60, 7), max_new_tokens=20, sampling=Sampling(1.0, seed=4), stop_tokens=())
    for _ in range(6):
        engine.step()
    twin = engine.fork(requests[1], sampling=Sampling())
    assert engine.steps._flight is None
    assert twin.tokens == requests[1].tokens
    for request in (*requests, drawn, twin):
        assert engine.cache.descriptor.num_tokens(request.id) == len(request.prompt) + len(request.tokens) - 1
    engine.cache.check()
    engine.wait([*requests, drawn, twin])
    expect(*requests, twin)
    alone = engine_for().generate([prompt(60, 7)], max_new_tokens=20, sampling=Sampling(1.0, seed=4), stop_tokens=())
    assert drawn.tokens == alone[0].tokens, "numbers that were drawn for a step that was taken back are drawn again"
    check_all_free(engine)


class BrokenError(Exception):
    """Of a model or a device."""


@pytest.mark.parametrize("what", ["forward", "prepare", "_chosen", "_launch_after", "tell"])
def test_a_step_that_cannot_be_launched_is_computed_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, requests = running()
    late = engine.submit(prompt(50, 8), max_new_tokens=9, stop_tokens=())
    owners: dict[str, Any] = {"forward": engine.runner, "prepare": engine.runner, "tell": engine.scheduler}
    owner = owners.get(what, engine.steps)
    whole = getattr(type(owner), what)
    for at in (1, 2, 3):
        num_before, calls = [len(request.tokens) for request in requests], itertools.count(1)

        def fails(*arguments: Any, calls: Iterator[int] = calls, at: int = at) -> Any:  # noqa: ANN401  anything
            found = whole(*arguments)
            if next(calls) == at:
                raise BrokenError
            return found

        with monkeypatch.context() as patch:
            patch.setattr(type(owner), what, fails)
            while not late.is_finished:
                try:
                    engine.step()
                except BrokenError:
                    break
            else:
                pytest.fail("it was never called so often")
        assert all(a <= len(request.tokens) for a, request in zip(num_before, requests, strict=True))
        assert engine.steps._flight is None
        for request in engine.scheduler.running:
            assert engine.cache.descriptor.num_tokens(request.id) == max(request.num_known, len(request.todo))
        engine.cache.check()
        assert engine.step() == [request for request in (*requests, late) if request in engine.scheduler.running]
    engine.wait([*requests, late])
    expect(*requests, late)
    check_all_free(engine)


def test_an_error_that_comes_again_lets_each_token_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that can be run every other time only: what was computed lands before the next step is launched ahead."""
    engine, requests = running()
    forward, calls = engine.runner.forward, itertools.count()

    def every_other(step: Any) -> torch.Tensor:  # noqa: ANN401  either kind
        if next(calls) % 2:
            raise BrokenError
        return forward(step)

    monkeypatch.setattr(engine.runner, "forward", every_other)
    for _ in range(200):
        if not engine.num_running:
            break
        with suppress(BrokenError):
            engine.step()
    expect(*requests)
    assert all(len(request.tokens) == 30 for request in requests)
    check_all_free(engine)


def test_tokens_that_cannot_be_read_are_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, requests = running()
    drawn = engine.submit(prompt(60, 7), max_new_tokens=20, sampling=Sampling(1.0, seed=4), stop_tokens=())
    for _ in range(5):
        engine.step()
    num_before = [len(request.tokens) for request in requests]
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(flights._Flight, "read", lambda _: (_ for _ in ()).throw(BrokenError()))
            with pytest.raises(BrokenError):
                engine.step()
        assert [len(request.tokens) for request in requests] == num_before
        for request in (*requests, drawn):
            assert engine.cache.descriptor.num_tokens(request.id) == request.num_done
        engine.cache.check()
    engine.wait([*requests, drawn])
    expect(*requests)
    alone = engine_for().generate([prompt(60, 7)], max_new_tokens=20, sampling=Sampling(1.0, seed=4), stop_tokens=())
    assert drawn.tokens == alone[0].tokens
    check_all_free(engine)


def test_a_prompt_whose_token_cannot_be_read_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(run_ahead=True)
    first = engine.submit(prompt(1, 9), max_new_tokens=30, stop_tokens=())
    for _ in range(3):
        engine.step()
    late = engine.submit(prompt(2, 21), max_new_tokens=30, stop_tokens=())
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(flights._Flight, "read", lambda _: (_ for _ in ()).throw(BrokenError()))
        with pytest.raises(BrokenError):
            engine.step()
    assert [engine.cache.descriptor.num_tokens(each.id) for each in (first, late)] == [first.num_done, 21]
    assert (late.num_done, late.tokens) == (0, [])
    engine.cache.check()
    engine.wait([first, late])
    expect(first, late)
    check_all_free(engine)


def test_what_waits_and_cannot_start_holds_nothing_up() -> None:
    """Steps go ahead while there are no pages for who waits; it is tried again when one has ended, and now and then."""
    for ends in (False, True):
        engine, requests = running(2, num_pages=60, most=100)
        manager = engine.cache.manager
        held = manager.allocate(manager.available_pages_count - 12)
        late = engine.submit(prompt(70, 120), max_new_tokens=4, stop_tokens=())
        begin, num_steps = engine.steps.num_ahead, 36
        for _ in range(num_steps):
            engine.step()
        assert not late.tokens
        assert num_steps - (engine.steps.num_ahead - begin) == 3, "when it came, and every 17 steps after that"
        manager.unref(held)
        if ends:
            engine.cancel(requests[0])
        for _ in range(2 if ends else 19):
            if not late.tokens:
                engine.step()
        assert late.tokens
        engine.wait([*requests, late])
        assert late.tokens == generated("Llama", late.prompt.tolist(), 4)
        expect(*requests)
        check_all_free(engine)


def test_who_waits_for_a_place_gets_it_with_the_step_after_one_has_ended() -> None:
    engine, requests = running(3, most=12, max_requests=3)
    late = engine.submit(prompt(70, 12), max_new_tokens=4, stop_tokens=())
    begin, num_steps = engine.steps.num_ahead, 0
    while not any(request.is_finished for request in requests):
        engine.step()
        num_steps += 1
    assert engine.steps.num_ahead - begin == num_steps - 1, "nothing but the last step waited for what it ended"
    assert not late.tokens
    engine.step()
    assert late.tokens
    engine.wait([*requests, late])
    expect(*requests)


def test_a_cancelled_request_lets_those_behind_it_be_tried() -> None:
    engine, requests = running(2, num_pages=60, most=60)
    manager = engine.cache.manager
    held = manager.allocate(manager.available_pages_count - 12)
    first, second = (engine.submit(prompt(70 + i, 150 - 140 * i), max_new_tokens=4) for i in range(2))
    engine.step()
    engine.step()
    assert not second.tokens, "it waits its turn"
    engine.cancel(first)
    engine.step()
    engine.step()
    assert second.tokens
    engine.wait([*requests, second])
    manager.unref(held)
    expect(*requests)


def test_steps_without_room_for_all_prompts_are_computed_one_by_one() -> None:
    """The second prompt has no row in the step that ends the first: it is not left out of the one after."""
    engine = engine_for(run_ahead=True, max_requests=2, max_tokens_per_step=8)
    requests = [engine.submit(prompt(i, 8), max_new_tokens=30, stop_tokens=()) for i in range(2)]
    engine.step()
    assert requests[0].tokens
    engine.step()
    engine.step()
    assert requests[1].tokens
    engine.wait(requests)
    expect(*requests)


def test_without_pages_for_one_step_more_it_is_not_launched() -> None:
    engine, requests = running(2, num_pages=9, most=26)
    engine.wait(requests)
    assert sum(request.num_preemptions for request in requests) > 0
    expect(*requests)
    check_all_free(engine)


def test_closing_leaves_nothing_on_its_way() -> None:
    engine, requests = running()
    engine.close()
    assert engine.steps._flight is None
    assert all(request.finish_reason == "cancelled" for request in requests)
    check_all_free(engine)


def test_it_is_on_by_itself_on_cuda_alone() -> None:
    assert not engine_for().steps.run_ahead
    assert not engine_for(run_ahead=False).steps.run_ahead
    assert engine_for(run_ahead=True).steps.run_ahead


def test_random_numbers_of_requests_are_their_own() -> None:
    """Requests of one seed in one batch draw alike, whatever is taken back in between."""
    engine = engine_for(run_ahead=True)
    options: dict[str, Any] = {"max_new_tokens": 24, "sampling": Sampling(1.3, seed=9), "stop_tokens": ()}
    requests = [engine.submit(SYSTEM, **options) for _ in range(3)]
    random = np.random.default_rng(0)
    while not all(request.is_finished for request in requests):
        engine.step()
        if random.random() < 0.3:
            engine.steps.drop()
    assert requests[0].tokens == requests[1].tokens == requests[2].tokens
    assert requests[0].tokens == engine_for().generate([SYSTEM], **options)[0].tokens
