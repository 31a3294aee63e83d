"""Answers that end before their time: a model that fails, a closed session, a cancelled task, a loop that is left."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch

from radix.integrations.transformers import Chat, Engine, sessions_for
from radix.integrations.transformers.attention import Step
from seqattn.errors import SessionError
from tests.integrations.models import cancel_again_and_again
from tests.integrations.test_chat import LETTERS, ChatTokenizer, engine_that_says


def chatting() -> tuple[Engine, Chat]:
    engine = engine_that_says(LETTERS, ChatTokenizer())
    return engine, Chat(engine, sessions_for(engine).open("ann"))


@pytest.mark.parametrize("num_forwards", [1, 4])
def test_a_message_is_taken_back_where_the_model_fails(num_forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, chat = chatting()
    chat.ask("one", max_new_tokens=5)
    before = chat.messages[:], chat.session.tokens.tolist()
    forward, left = engine.runner.forward, iter(range(num_forwards - 1))

    def fail(step: Step) -> torch.Tensor:
        if next(left, None) is None:
            raise RuntimeError("out of memory")
        return forward(step)

    monkeypatch.setattr(engine.runner, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        chat.ask("two", max_new_tokens=5)
    monkeypatch.undo()
    assert (chat.messages, chat.session.tokens.tolist()) == before
    assert chat.ask("two", max_new_tokens=5).tokens
    engine.cache.check()


def test_an_answer_of_a_session_that_was_closed_meanwhile_changes_nothing() -> None:
    engine, chat = chatting()
    chat.ask("one", max_new_tokens=5)
    request = chat.submit("two", max_new_tokens=5)
    chat.session.close()
    engine.wait([request])
    for _ in range(2):
        with pytest.raises(SessionError, match="is closed: its answer cannot be kept"):
            chat.accept()
    assert len(chat.messages) == 2
    engine.cache.check()


def test_an_async_answer_that_is_left_is_closed_before_the_next_message() -> None:
    engine, chat = chatting()

    async def talk() -> None:
        async with contextlib.aclosing(chat.astream("one", max_new_tokens=9)) as pieces:
            async for _ in pieces:
                break
        assert [piece async for piece in chat.astream("two", max_new_tokens=5)]

    asyncio.run(talk())
    assert len(chat.messages) == 4
    engine.cache.check()


def test_an_async_answer_whose_task_is_cancelled_again_and_again_is_accepted() -> None:
    engine, chat = chatting()

    async def listen() -> None:
        async for _ in chat.astream("one", max_new_tokens=200):
            pass

    cancel_again_and_again(engine, listen)
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert chat.ask("two", max_new_tokens=5).tokens
