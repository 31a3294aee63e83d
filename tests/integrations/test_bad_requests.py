"""What is no request is refused at once, with what to do, and leaves nothing behind."""

from __future__ import annotations

import pytest

from radix.integrations.transformers import Engine
from seqattn import (
    BadValueError,
    DuplicateSequenceError,
    LengthError,
    PromptTooLargeError,
    TokenError,
)
from tests.integrations.models import VOCAB_SIZE, Untyped, check_all_free, engine_for, prompt

pytest.importorskip("transformers", reason="needs the extra chat")

ENOUGH: dict[str, Untyped] = {"max_new_tokens": 4}


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine = engine_for(num_pages=4)
    with pytest.raises(PromptTooLargeError, match="5 pages needed, 4 available"):
        engine.submit(prompt(1, 30), max_new_tokens=4)
    assert len(engine.generate([prompt(1, 30)], max_new_tokens=3, stop_tokens=())[0].tokens) == 3
    big = engine_for()
    with pytest.raises(LengthError, match="250 prompt tokens and 8 new ones do not fit the model's 256 positions"):
        big.submit(prompt(1, 250), max_new_tokens=8)
    big.submit(prompt(1, 250), max_new_tokens=7)
    assert big.num_waiting == 1


@pytest.mark.parametrize(("ids", "problem"), [([], "empty prompt"), ([3, VOCAB_SIZE], "token id 160 at position 1")])
def test_bad_prompts_are_refused(ids: list[int], problem: str) -> None:
    engine = engine_for()
    with pytest.raises(TokenError, match=problem):
        engine.submit(ids, max_new_tokens=4)
    with pytest.raises(TokenError):
        engine.generate([prompt(1, 5), ids], max_new_tokens=4)
    assert engine.num_waiting == 0, "the first of the two is cancelled"


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"max_new_tokens": 0}, LengthError, "max_new_tokens must be an integer of at least 1, not 0"),
        ({"max_new_tokens": 2.0}, LengthError, "not 2.0"),
        ({"sampling": 0.7}, BadValueError, "sampling must be a Sampling, not 0.7"),
        ({"stop_tokens": 5}, TokenError, "flat list, not the single value 5"),
        ({"stop_tokens": {-1}}, TokenError, "-1"),
        ({"stop_tokens": "end"}, TokenError, "not str"),
        ({"namespace": []}, BadValueError, r"namespace must be hashable, not \[\]"),
        ({"request_id": []}, BadValueError, "must be hashable"),
        ({"request_id": "waiting"}, DuplicateSequenceError, "'waiting' waits already"),
        ({"request_id": "running"}, DuplicateSequenceError, "'running' is running already"),
    ],
)
def test_bad_options_are_refused_and_queue_nothing(
    options: dict[str, Untyped], error: type[Exception], problem: str
) -> None:
    engine = engine_for()
    engine.submit(prompt(1, 4), max_new_tokens=4, request_id="running")
    engine.step()
    engine.submit(prompt(2, 4), max_new_tokens=4, request_id="waiting")
    with pytest.raises(error, match=problem):
        engine.submit(prompt(1, 5), **ENOUGH | options)
    assert engine.num_waiting == 1


@pytest.mark.parametrize("method", ["stream", "astream"])
@pytest.mark.parametrize(
    ("ids", "options", "error"),
    [
        ([], {}, TokenError),
        ([1, 2], {"max_new_tokens": 0}, LengthError),
        ([1, 2], {"stop_texts": ["a"]}, BadValueError),
        ([1, 2], {"namespace": []}, BadValueError),
        ([1, 2], {"request_id": []}, BadValueError),
        ([1, 2], {"temperature": 1.0}, TypeError),
    ],
)
def test_a_stream_refuses_what_is_no_request_at_the_call(
    method: str, ids: list[int], options: dict[str, Untyped], error: type[Exception]
) -> None:
    engine = engine_for()
    with pytest.raises(error):
        getattr(engine, method)(ids, **options)
    check_all_free(engine)


def test_a_stream_that_nobody_reads_leaves_nothing_behind() -> None:
    engine = engine_for()
    stream, other = (engine.stream(prompt(1, 5), max_new_tokens=2, request_id="mine") for _ in range(2))
    assert engine.num_waiting == 0
    del stream
    assert [piece.tokens for piece in other]
    check_all_free(engine)


def test_a_stream_whose_id_is_taken_meanwhile_leaves_the_other_alone() -> None:
    engine = engine_for()
    stream = engine.stream(prompt(1, 5), max_new_tokens=2, request_id="mine")
    request = engine.submit(prompt(2, 5), max_new_tokens=2, request_id="mine")
    with pytest.raises(DuplicateSequenceError, match="'mine' waits already"):
        next(stream)
    assert engine.wait([request])[0].finish_reason in {"stop", "length"}
    check_all_free(engine)


def test_an_id_may_be_used_again_when_its_request_is_finished_or_cancelled() -> None:
    engine = engine_for()
    for _ in range(2):
        engine.generate([prompt(1, 4)], max_new_tokens=2, request_id="again")
        engine.cancel(engine.submit(prompt(1, 4), max_new_tokens=2, request_id="again"))
    check_all_free(engine)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cost_model": "fast"}, "cost_model must be None, 'auto' or a CostModel, not 'fast'"),
        ({"packing": "both"}, "packing must be 'hybrid' or 'plain', not 'both'"),
        ({"run_ahead": "auto"}, "run_ahead must be True, False, or None for True on CUDA, not 'auto'"),
    ],
)
def test_bad_options_of_an_engine_are_refused(options: dict[str, Untyped], problem: str) -> None:
    with pytest.raises(BadValueError, match=problem):
        engine_for(**options)


def test_an_engine_needs_a_cache_not_its_memory() -> None:
    engine = engine_for()
    for wrong in (engine.cache.manager, None):
        with pytest.raises(BadValueError, match="cache must be a PrefixCache, not"):
            Engine(engine.model, None, wrong)  # type: ignore[arg-type]


def test_one_prompt_is_no_list_of_prompts() -> None:
    with pytest.raises(BadValueError, match="must be a list of prompts, not the text 'Hello'"):
        engine_for().generate("Hello")
