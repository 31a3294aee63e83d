"""Conversations in messages over a tiny model: what is reused and taken back, and what is said when a prompt breaks."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import Sequence

import pytest
import torch

from radix import PrefixCache, RetokenisationWarning, Sessions
from radix.integrations.transformers import Chat, Engine, manager_for, sessions_for
from seqattn.errors import BadValueError, LengthError, SeqAttnError, SessionError
from tests.integrations.byte_tokenizer import NUM_SPECIAL, VOCAB_SIZE, ByteTokenizer
from tests.integrations.models import Untyped, check_all_free, engine_for, make

pytest.importorskip("transformers", reason="needs the extra chat")

LETTERS = "etaoin"
PAIR = VOCAB_SIZE


class ChatTokenizer(ByteTokenizer):
    """Spells special tokens out where it is asked to; the text "ee" is one token, though a model may give two."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        ids: list[int] = []
        for number, part in enumerate(text.split("ee")):
            ids += [PAIR] * (number > 0) + super().__call__(part, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        marks = {0: "", 1: "", 2: "<", 3: ">"} if not skip_special_tokens else dict.fromkeys(range(4), "")
        return "".join("ee" if i == PAIR else marks.get(i, chr(max(0, i - NUM_SPECIAL))) for i in ids)


class TrimmingTokenizer(ChatTokenizer):
    """Its template trims what messages begin and end with."""

    def apply_chat_template(self, messages: Sequence[dict[str, Untyped]], **options: Untyped) -> str:
        trimmed = [{**message, "content": message["content"].strip()} for message in messages]
        return super().apply_chat_template(trimmed, **options)


class CountingTokenizer(ChatTokenizer):
    """Its template begins with the number of messages, as others do with the date: no prompt begins like the last."""

    def apply_chat_template(self, messages: Sequence[dict[str, Untyped]], **options: Untyped) -> str:
        return f"{len(messages)}{super().apply_chat_template(messages, **options)}"


def engine_that_says(letters: str, tokenizer: ByteTokenizer | None = None, *, num_pages: int = 256) -> Engine:
    """An engine whose random model has only these letters."""
    model = make("Llama", vocab_size=VOCAB_SIZE + 1, max_position_embeddings=1024)
    others = torch.ones(VOCAB_SIZE + 1, dtype=torch.bool)
    others[[ord(letter) + NUM_SPECIAL for letter in letters]] = False
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, logits: logits.masked_fill(others, -torch.inf)
    )
    cache = PrefixCache(manager_for(model, num_pages=num_pages, page_size=8))
    return Engine(model, tokenizer or ChatTokenizer(), cache)


@pytest.fixture
def engine() -> Engine:
    return engine_that_says(LETTERS)


@pytest.fixture
def sessions(engine: Engine) -> Sessions:
    return sessions_for(engine, clock=lambda: 0.0)


def test_each_turn_computes_its_new_tokens_and_the_last_of_the_answer(engine: Engine, sessions: Sessions) -> None:
    session = sessions.open("ann")
    chat = Chat(engine, session, messages=[{"role": "system", "content": "Be brief."}])
    for turn in range(8):
        num_held = session.num_tokens
        request = chat.ask(f"Question {turn}?", max_new_tokens=7)
        assert request.num_computed_tokens == len(request.prompt) - num_held + (turn > 0)
        assert session.tokens.tolist() == [*request.prompt.tolist(), *request.tokens]
        assert session.num_pinned_tokens == session.num_tokens - 1
        assert chat.messages[-1] == {"role": "assistant", "content": request.text}
        cold = engine.generate([request.prompt], namespace=turn, max_new_tokens=7)
        assert cold[0].tokens == request.tokens
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 8]
    session.discard()
    check_all_free(engine)


def test_tokens_that_encode_their_own_text_in_another_way_stay_as_they_are() -> None:
    engine = engine_that_says("e")
    session = sessions_for(engine).open("ann")
    chat = Chat(engine, session)
    first = chat.ask("hello", max_new_tokens=5)
    assert first.text == "eeeee"
    assert engine.tokenizer is not None
    assert engine.tokenizer("eeeee", add_special_tokens=False)["input_ids"] != first.tokens
    second = chat.ask("again", max_new_tokens=5)
    assert session.last_break is None
    assert second.prompt[: len(first.prompt) + 5].tolist() == [*first.prompt.tolist(), *first.tokens]
    assert second.num_cached_tokens == len(first.prompt) + 4


def test_a_template_that_renders_the_beginning_anew_is_warned_of() -> None:
    heard: list[int] = []
    engine = engine_that_says(LETTERS, CountingTokenizer())
    session = sessions_for(engine, on_break=lambda _, found: heard.append(found.position)).open("ann")
    chat = Chat(engine, session)
    chat.ask("hello", max_new_tokens=5)
    with pytest.warns(RetokenisationWarning, match="at token 0, after ''.*the beginning is another") as warned:
        answer = chat.ask("again", max_new_tokens=5)
    assert "held '1<user:" in str(warned[0].message)
    assert (answer.num_cached_tokens, heard) == (0, [0])
    assert session.tokens.tolist() == [*answer.prompt.tolist(), *answer.tokens]
    chat.rollback()
    assert (session.num_tokens, len(chat.messages)) == (0, 2)


def test_where_warnings_are_errors_the_message_is_taken_back() -> None:
    engine = engine_that_says(LETTERS, CountingTokenizer())
    chat = Chat(engine, sessions_for(engine).open("ann"))
    chat.ask("hello", max_new_tokens=5)
    before = chat.messages[:], chat.session.tokens.tolist(), chat.session.lengths[:], chat.session.last_break
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RetokenisationWarning):
            chat.ask("again", max_new_tokens=5)
    assert (engine.num_waiting, engine.num_running) == (0, 0)
    assert (chat.messages, chat.session.tokens.tolist(), chat.session.lengths, chat.session.last_break) == before
    with pytest.warns(RetokenisationWarning):
        assert chat.ask("again", max_new_tokens=5).tokens
    engine.cache.check()


def test_a_message_is_taken_back_where_the_listener_raises() -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such template")

    engine = engine_that_says(LETTERS, ChatTokenizer())
    chat = Chat(engine, sessions_for(engine, on_break=refuse).open("ann"))
    first = chat.ask("one", max_new_tokens=5)
    chat.ask("two", max_new_tokens=5)
    chat.messages[1] = {"role": "assistant", "content": first.text[:2] + "?"}
    with pytest.warns(RetokenisationWarning), pytest.raises(RuntimeError, match="no such template"):
        chat.ask("three", max_new_tokens=5)
    assert (len(chat.messages), engine.num_waiting, engine.num_running) == (4, 0, 0)
    assert chat.session.tokens.tolist() == first.all_tokens[: len(first.prompt) + 2].tolist(), "as far as both agree"
    chat.rollback(2)
    assert (chat.messages, chat.session.num_tokens) == ([], 0)
    engine.cache.check()


def test_a_template_that_trims_an_answer_costs_that_answer_alone() -> None:
    engine = engine_that_says("e ", TrimmingTokenizer())
    chat = Chat(engine, sessions_for(engine).open("ann"))
    first = chat.ask("hello", max_new_tokens=7, stop_tokens=())
    assert "ee" in first.text, "spelled by the model in other tokens than by the tokenizer"
    for message in ("again", "and again", "more"):
        held, num_prompt = chat.session.tokens, len(first.prompt)
        trims = first.text != first.text.strip()
        with pytest.warns(RetokenisationWarning) if trims else contextlib.nullcontext():
            answer = chat.ask(message, max_new_tokens=7, stop_tokens=())
        if trims:
            assert chat.session.last_break is not None
            assert chat.session.last_break.position >= num_prompt, "all turns before the last are as they were"
        assert answer.prompt[:num_prompt].tolist() == held[:num_prompt].tolist()
        first = answer
    assert chat.session.last_break is not None, "nothing was trimmed: say more"
    engine.cache.check()


def test_what_a_stop_text_cuts_off_is_no_part_of_the_conversation(engine: Engine, sessions: Sessions) -> None:
    chat, whole = Chat(engine, sessions.open("ann")), Chat(engine, sessions.open("ben"))
    text = whole.ask("hello", max_new_tokens=9).text
    answer = chat.ask("hello", max_new_tokens=9, stop_texts=[text[4:7]])
    assert answer.text == text[: text.find(text[4:7])]
    assert len(answer.tokens) > len(answer.text)
    assert chat.session.tokens.tolist() == [*answer.prompt.tolist(), *answer.tokens[: len(answer.text)]]
    chat.ask("again", max_new_tokens=3)
    assert chat.session.last_break is None
    engine.cache.check()


def test_messages_that_the_template_does_not_take_are_refused(engine: Engine, sessions: Sessions) -> None:
    chat = Chat(engine, sessions.open("ann"), messages=[{"text": "Be brief."}])
    with pytest.raises(BadValueError, match="chat template cannot render these messages: 'role'"):
        chat.ask("hello")
    with pytest.raises(BadValueError, match="chat template cannot render these messages: 'role'"):
        engine.submit([{"content": "hello"}])
    assert (chat.session.num_tokens, engine.num_waiting) == (0, 0)


def test_closed_sessions_give_way_to_who_could_not_run_otherwise() -> None:
    engine = engine_that_says(LETTERS, num_pages=20)
    sessions = sessions_for(engine, clock=lambda: 0.0)
    for name in ("ann", "ben", "cem"):
        with sessions.open(name) as session:
            Chat(engine, session).ask(name * 7, max_new_tokens=4)
    assert len(sessions) == 3
    with sessions.open("dan") as session:
        assert Chat(engine, session).ask("dan" * 10, max_new_tokens=4).tokens
    assert len(sessions) == 3, "one had to go, and no more"
    assert sessions.open("ann").num_tokens == 0, "the one that was closed first"
    sessions.check()
    engine.cache.check()


def test_sessions_have_a_place_with_their_engine_only_while_there_are_any() -> None:
    engine, now = engine_that_says(LETTERS), [0.0]
    for _ in range(3):
        sessions = sessions_for(engine, clock=lambda: now[0], time_to_live=5.0)
        assert engine.on_short == []
        for name in ("ann", "ben"):
            sessions.open(name).close()
        sessions.open("cem").discard()
        assert engine.on_short == [sessions.expire_next]
        now[0] += 5.0
        assert sessions.expire() == 2
        assert engine.on_short == []
    sessions.open("ann").close()
    assert engine.on_short[0]()
    assert engine.on_short == []


def test_many_chats_are_answered_in_one_batch(engine: Engine, sessions: Sessions) -> None:
    system = [{"role": "system", "content": "Be brief, be kind."}]
    chats = [Chat(engine, sessions.open(number), messages=system) for number in range(4)]
    for turn in range(3):
        requests = [chat.submit(f"{turn} from {chat.session.id}", max_new_tokens=6) for chat in chats]
        engine.wait(requests)
        for chat, request in zip(chats, requests, strict=True):
            chat.accept()
            alone = engine.generate([request.prompt], namespace="alone", max_new_tokens=6)
            assert alone[0].tokens == request.tokens
    for chat in chats:
        chat.session.discard()
    check_all_free(engine)


# -- streams -----------------------------------------------------------------------------------------------------------


def test_an_answer_streams_and_is_part_of_the_conversation_then(engine: Engine, sessions: Sessions) -> None:
    chat, twin = Chat(engine, sessions.open("ann")), Chat(engine, sessions.open("ben"))
    text = "".join(piece.text for piece in chat.stream("hello", max_new_tokens=9))
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
    assert twin.ask("hello", max_new_tokens=9).text == text

    async def gathered() -> str:
        return "".join([piece.text async for piece in twin.astream("again", max_new_tokens=9)])

    assert asyncio.run(gathered()) == chat.ask("again", max_new_tokens=9).text
    assert chat.messages == twin.messages


def test_who_leaves_a_stream_keeps_what_was_said(engine: Engine, sessions: Sessions) -> None:
    chat = Chat(engine, sessions.open("ann"))
    stream = chat.stream("hello", max_new_tokens=30)
    said = next(stream).text + next(stream).text
    stream.close()
    assert chat.messages[-1]["content"] == said
    assert chat.session.num_tokens == chat.session.num_pinned_tokens + 1
    assert chat.ask("go on", max_new_tokens=3).num_cached_tokens == chat.session.lengths[1] - 1
    engine.cache.check()


def test_a_message_without_an_answer_is_taken_back(
    engine: Engine, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(engine, sessions.open("ann"))
    chat.ask("hello", max_new_tokens=3)
    num_tokens, messages = chat.session.num_tokens, chat.messages[:]

    def fail(*_: object) -> None:
        raise RuntimeError("no power")

    monkeypatch.setattr(engine.runner, "forward", fail)
    with pytest.raises(RuntimeError, match="no power"):
        chat.ask("again", max_new_tokens=3)
    monkeypatch.undo()
    assert (chat.session.num_tokens, chat.messages) == (num_tokens, messages)
    assert chat.ask("again", max_new_tokens=3).num_cached_tokens == num_tokens - 1
    engine.cache.check()


# -- branches ----------------------------------------------------------------------------------------------------------


def test_a_turn_that_is_taken_back_leaves_the_conversation_as_it_was(engine: Engine, sessions: Sessions) -> None:
    chat = Chat(engine, sessions.open("ann"))
    answers = [chat.ask(message, max_new_tokens=5) for message in ("one", "two", "three")]
    chat.rollback(2)
    assert [message["content"] for message in chat.messages] == ["one", answers[0].text]
    again = chat.ask("two", max_new_tokens=5)
    assert again.prompt.tolist() == answers[1].prompt.tolist()
    assert again.tokens == answers[1].tokens
    chat.rollback(0)
    chat.rollback(2)
    assert (chat.messages, chat.session.num_tokens) == ([], 0)
    engine.cache.check()


def test_branches_share_what_was_said_before_and_are_independent(engine: Engine, sessions: Sessions) -> None:
    chat = Chat(engine, sessions.open("ann"))
    chat.ask("hello", max_new_tokens=9)
    num_held = chat.session.num_tokens
    branches = [chat.fork(f"branch {number}") for number in range(3)]
    requests = [branch.submit(f"number {number}", max_new_tokens=5) for number, branch in enumerate(branches)]
    num_copied = engine.cache.stats.num_forked_pages
    engine.wait(requests)
    assert engine.cache.stats.num_forked_pages <= num_copied + 3, "a branch copies the page where they part, no other"
    for branch, request in zip(branches, requests, strict=True):
        branch.accept()
        assert (request.num_cached_tokens or 0) >= num_held - 1
    for branch in branches[1:]:
        branch.session.discard()
    assert len(chat.messages) == 2
    assert len(branches[0].messages) == 4
    branches[0].rollback(2)
    assert branches[0].messages == []
    engine.cache.check()


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_chat_needs_a_tokenizer_and_a_session_of_the_engines_cache(engine: Engine) -> None:
    other = engine_that_says(LETTERS)
    with pytest.raises(BadValueError, match="belongs to another cache"):
        Chat(engine, sessions_for(other).open("ann"))
    bare = engine_for()
    with pytest.raises(BadValueError, match="a tokenizer with a chat template"):
        sessions_for(bare)
    session = Sessions(bare.cache, clock=lambda: 0.0).open("ann")
    with pytest.raises(BadValueError, match="a tokenizer with a chat template"):
        Chat(bare, session)


def test_a_message_waits_for_the_answer_to_the_last(engine: Engine, sessions: Sessions) -> None:
    chat = Chat(engine, sessions.open("ann"))
    with pytest.raises(SessionError, match="no finished request"):
        chat.accept()
    request = chat.submit("hello", max_new_tokens=3)
    for call in (lambda: chat.submit("again"), lambda: chat.fork("ben"), chat.rollback):
        with pytest.raises((SessionError, BadValueError), match="still being answered"):
            call()
    with pytest.raises(SessionError, match="no finished request"):
        chat.accept()
    engine.wait([request])
    chat.accept()
    chat.session.close()
    with pytest.raises(SessionError, match="'ann' is closed"):
        chat.submit("again")


def test_bad_values_leave_a_chat_as_it_was(engine: Engine, sessions: Sessions) -> None:
    chat = Chat(engine, sessions.open("ann"))
    chat.ask("hello", max_new_tokens=3)
    before = chat.messages[:], chat.session.tokens.tolist()
    with pytest.raises(SeqAttnError, match="do not fit the model's 1024 positions"):
        chat.ask("x" * 2000)
    with pytest.raises(LengthError, match="num_turns must be an integer of at least 0, not -1"):
        chat.rollback(-1)
    with pytest.raises(BadValueError, match="2 turns cannot be taken back: there were 1"):
        chat.rollback(2)
    with pytest.raises(SessionError, match="'ann' exists"):
        chat.fork("ann")
    assert (chat.messages, chat.session.tokens.tolist()) == before
