"""Prompts as text and messages, and answers as text that grows: whole characters, stop texts, streams."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix import PrefixCache
from radix.integrations.transformers import Engine, Piece, manager_for
from radix.integrations.transformers.text import TextStream, decode, encode
from seqattn import BadValueError, TokenError
from tests.integrations.byte_tokenizer import NUM_SPECIAL, VOCAB_SIZE, ByteTokenizer
from tests.integrations.models import Untyped, cancel_again_and_again, check_all_free, engine_for, make, prompt

pytest.importorskip("transformers", reason="needs the extra chat")

TOKENIZER = ByteTokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = make("Llama", vocab_size=VOCAB_SIZE)
    return Engine(model, TOKENIZER, PrefixCache(manager_for(model, num_pages=64, page_size=8)))


def test_a_text_gets_the_tokenizers_special_tokens_and_messages_those_of_their_template() -> None:
    assert encode(TOKENIZER, "hé", VOCAB_SIZE).tolist() == [0, *ids_of("hé")]
    messages = [{"role": "user", "content": "hi"}]
    assert encode(TOKENIZER, messages, VOCAB_SIZE).tolist() == [2, *ids_of("user:hi"), 3, 2, *ids_of("assistant:")]
    assert encode(None, [5, 6], VOCAB_SIZE).tolist() == [5, 6]


@pytest.mark.parametrize("given", ["text", [{"role": "user", "content": "hi"}]])
def test_a_text_without_a_tokenizer_is_refused(given: Untyped) -> None:
    with pytest.raises(BadValueError, match="needs a tokenizer"):
        encode(None, given, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("given", "problem"), [([-1], "-1 at position 0"), ([[1]], "flat list"), ([1.5], "1.5"), ([], "empty prompt")]
)
def test_what_is_no_prompt_is_refused(given: Untyped, problem: str) -> None:
    with pytest.raises(TokenError, match=problem):
        encode(TOKENIZER, given, VOCAB_SIZE)


@given(st.text(max_size=40), st.lists(st.integers(1, 5), min_size=1))
def test_text_that_grows_is_whole_at_every_step_and_complete_at_the_end(text: str, sizes: list[int]) -> None:
    text = text.replace("<", "").replace(">", "").replace("\ufffd", "")
    stream, ids, at = TextStream(TOKENIZER), ids_of(text), 0
    while at < len(ids):
        size = sizes[at % len(sizes)]
        stream.push(ids[at : at + size])
        at += size
        assert text.startswith(stream.text), "no broken character, nothing taken back"
    assert stream.text == text


def test_what_stays_incomplete_comes_with_the_last_tokens() -> None:
    stream, ids = TextStream(TOKENIZER), ids_of("a😀")
    for token in ids[:-1]:
        stream.push([token])
        assert stream.text == "a"
    stream.push([], is_last=True)
    assert stream.text == "a\ufffd"


def test_bytes_that_are_no_characters_are_not_held_back_for_long() -> None:
    stream = TextStream(TOKENIZER)
    for num_tokens in range(1, 50):
        stream.push([0x80 + NUM_SPECIAL])
        assert len(stream.text) > num_tokens - 8


class CountingTokenizer(ByteTokenizer):
    """Counts the tokens that it decodes; a token above all others is a broken character that swallows its like."""

    def __init__(self) -> None:
        self.num_decoded = 0

    def decode(self, ids: Sequence[int], **options: bool) -> str:
        self.num_decoded += len(ids)
        broken = [i for i in ids if i >= VOCAB_SIZE]
        return super().decode([i for i in ids if i < VOCAB_SIZE], **options) + "\ufffd" * bool(broken)


@pytest.mark.parametrize("silent", [0, VOCAB_SIZE], ids=["no text", "an incomplete character"])
def test_tokens_that_give_no_text_cost_no_more_the_more_there_are(silent: int) -> None:
    for num_tokens in (100, 1000):
        tokenizer = CountingTokenizer()
        stream, ids = TextStream(tokenizer), [*ids_of("ab"), *([silent] * num_tokens + ids_of("é")) * 2]
        for token in ids:
            stream.push([token])
        assert stream.text.startswith("ab")
        assert tokenizer.num_decoded < 40 * len(ids)


@given(st.lists(st.tuples(st.integers(0, 40), st.text(max_size=3)), max_size=8))
def test_text_between_tokens_that_give_none_is_that_of_all_tokens(runs: list[tuple[int, str]]) -> None:
    stream, ids = TextStream(TOKENIZER), [i for size, text in runs for i in ([0] * size + ids_of(text))]
    for token in ids:
        stream.push([token])
    stream.push([], is_last=True)
    assert stream.text == decode(TOKENIZER, ids)


@given(st.text("ab.", max_size=30), st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_text_is_found_where_it_first_stands_and_never_given_away(text: str, stops: list[str]) -> None:
    stream, given_away = TextStream(TOKENIZER, stops), 0
    for i, token in enumerate(ids_of(text)):
        stream.push([token])
        found = [at for at in (text[: i + 1].find(stop) for stop in stops) if at >= 0]
        assert stream.stop == min(found, default=None)
        assert stream.certain() >= given_away
        given_away = stream.certain()
        if found:
            break
        rest = text[given_away : i + 1]
        assert all(stop not in text[: i + 1] for stop in stops)
        assert not rest or any(stop.startswith(rest) for stop in stops), "only what may begin a stop is held back"
    else:
        return
    assert given_away == stream.stop


def collect(pieces: list[Piece]) -> tuple[list[int], str]:
    return [token for piece in pieces for token in piece.tokens], "".join(piece.text for piece in pieces)


def test_a_stream_gives_the_same_tokens_and_text_as_a_finished_request(engine: Engine) -> None:
    (whole,) = engine.generate(["Hello"], max_new_tokens=24, stop_tokens=())
    pieces = list(engine.stream("Hello", max_new_tokens=24, stop_tokens=()))
    assert collect(pieces) == (whole.tokens, whole.text)
    assert [len(piece.tokens) for piece in pieces if piece.tokens] == [1] * 24
    engine.cache.check()


def test_two_streams_side_by_side_give_what_each_gives_alone(engine: Engine) -> None:
    alone = [collect(list(engine.stream(text, max_new_tokens=9))) for text in ("one", "two")]
    first, second = (engine.stream(text, max_new_tokens=9) for text in ("one", "two"))
    both: tuple[list[Piece], list[Piece]] = [], []
    for piece in first:
        both[0].append(piece)
        both[1].extend(next(second, Piece([], "")) for _ in range(2))
    both[1].extend(second)
    assert [collect(pieces) for pieces in both] == alone


def test_leaving_a_stream_cancels_its_request(engine: Engine) -> None:
    stream = engine.stream("Hello", max_new_tokens=24, stop_tokens=())
    next(stream)
    assert engine.num_running == 1
    stream.close()
    assert engine.num_running == 0
    engine.cache.check()


def test_any_number_may_follow_a_request_also_when_it_is_finished(engine: Engine) -> None:
    request = engine.submit("Hello", max_new_tokens=12, stop_tokens=())
    assert collect(list(engine.follow(request))) == (request.tokens, request.text)
    assert list(engine.follow(request)) == [Piece(request.tokens, request.text)]


def test_a_stop_text_ends_the_answer_before_it(engine: Engine) -> None:
    (whole,) = engine.generate(["Once"], max_new_tokens=40, stop_tokens=())
    stop = whole.text[7:9]
    at = whole.text.find(stop)
    (answer,) = engine.generate(["Once"], max_new_tokens=40, stop_tokens=(), stop_texts=["never there", stop])
    assert (answer.text, answer.finish_reason) == (whole.text[:at], "stop")
    assert answer.tokens == whole.tokens[: len(answer.tokens)]
    pieces = list(engine.stream("Once", max_new_tokens=40, stop_tokens=(), stop_texts=[stop]))
    assert collect(pieces) == (answer.tokens, answer.text)


def test_stop_tokens_replace_the_models_own(engine: Engine) -> None:
    (whole,) = engine.generate(["Once"], max_new_tokens=40, stop_tokens=())
    stop = whole.tokens[5]
    (answer,) = engine.generate(["Once"], max_new_tokens=40, stop_tokens=[stop, VOCAB_SIZE])
    assert answer.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert answer.finish_reason == "stop"
    assert engine.end_tokens == {TOKENIZER.eos_token_id}


@pytest.mark.parametrize("stops", ["abc", [""], ["a", ""]])
def test_a_stop_text_that_is_none_is_refused(engine: Engine, stops: Untyped) -> None:
    with pytest.raises(BadValueError, match="stop_texts must be texts"):
        engine.submit("Hello", stop_texts=stops, max_new_tokens=4)
    with pytest.raises(BadValueError, match="need a tokenizer"):
        engine_for().submit(prompt(1, 4), stop_texts=["a"], max_new_tokens=4)


def test_without_a_tokenizer_pieces_bring_tokens_and_no_text() -> None:
    assert {piece.text for piece in engine_for().stream(prompt(1, 4), max_new_tokens=3)} == {""}


def test_async_streams_run_side_by_side_in_the_steps_of_one_engine(engine: Engine) -> None:
    texts = ["one", "two", "three"]
    alone = [collect(list(engine.stream(text, max_new_tokens=9, stop_tokens=()))) for text in texts]
    num_forwards = [0]
    handle = engine.model.register_forward_hook(lambda *_: num_forwards.__setitem__(0, num_forwards[0] + 1))

    async def listen(text: str) -> tuple[list[int], str]:
        return collect([piece async for piece in engine.astream(text, max_new_tokens=9, stop_tokens=())])

    async def all_of_them() -> list[tuple[list[int], str]]:
        return list(await asyncio.gather(*map(listen, texts)))

    assert asyncio.run(all_of_them()) == alone
    handle.remove()
    assert num_forwards[0] <= 9 + len(texts), "a step is shared by all"
    check_all_free(engine)


def test_leaving_an_async_stream_cancels_its_request(engine: Engine) -> None:
    async def leave() -> None:
        stream = engine.astream("Hello", max_new_tokens=24, stop_tokens=())
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave())
    check_all_free(engine)


def test_a_task_that_is_cancelled_again_and_again_leaves_no_request(engine: Engine) -> None:
    async def listen() -> None:
        async for _ in engine.astream("Hello", max_new_tokens=200, stop_tokens=()):
            pass

    for _ in range(5):
        cancel_again_and_again(engine, listen)
        check_all_free(engine)


def test_special_tokens_are_not_part_of_the_text() -> None:
    stream = TextStream(TOKENIZER)
    stream.push([0, *ids_of("a"), 3, *ids_of("b"), 1])
    assert stream.text == "ab"
    assert NUM_SPECIAL == 4
