"""A real model on real conversations: greedy answers are those of `model.generate`, only new tokens are computed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch

from radix import PrefixCache
from radix.integrations.transformers import Engine, Sampling, manager_for
from tests.integrations import smollm2
from tests.integrations.conversations import OURS
from tests.integrations.models import Untyped, check_all_free
from tests.traces import TRACES, why_absent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(smollm2.why_absent() is not None, reason=f"SmolLM2: {smollm2.why_absent()}"),
]

QUESTIONS = "fastchat-mt-bench/question.jsonl.gz"
NUM_NEW = 24
END_OF_MESSAGE = 2
SCRIPT = [
    "Hello! Who are you?",
    "I am planning a small garden. What should I plant first?",
    "How often do I water tomatoes?",
    "What can I grow in the shade?",
    "Which of these plants attract bees?",
    "How do I keep snails away?",
    "Summarise your advice in two sentences.",
    "Thank you. Say goodbye in French.",
]


class Truth:
    """The model by itself, one conversation at a time."""

    def __init__(self) -> None:
        self.model, self.tokenizer = smollm2.load()

    def generated(self, ids: list[int], num_new: int = NUM_NEW) -> list[int]:
        with torch.no_grad():
            out = self.model.generate(torch.tensor([ids]), max_new_tokens=num_new, do_sample=False)
        answer: list[int] = out[0, len(ids) :].tolist()
        return answer

    def logits(self, ids: list[int], first: int) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(torch.tensor([ids])).logits[0, first:]
        return logits

    def first_prompt(self, message: str) -> list[int]:
        messages = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def next_turn(self, answer: list[int], message: str) -> list[int]:
        """The tokens that follow an answer: its end, if it was cut, and the next message."""
        text = f"\n<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        end = [] if answer[-1] == END_OF_MESSAGE else [END_OF_MESSAGE]
        ids: list[int] = end + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth()


@pytest.fixture
def engine(truth: Truth) -> Iterator[Engine]:
    """An engine with room for everything; the model is itself again afterwards."""
    with engine_of(truth, num_pages=1024) as engine:
        yield engine


def engine_of(truth: Truth, *, num_pages: int, **options: Untyped) -> Engine:
    cache = PrefixCache(manager_for(truth.model, num_pages=num_pages))
    return Engine(truth.model, truth.tokenizer, cache, **options)


class TwoTurns(NamedTuple):
    """A conversation as `generate` answers it: two prompts, token ids, and their answers."""

    first: list[int]
    first_answer: list[int]
    second: list[int]
    second_answer: list[int]


@pytest.fixture(scope="module")
def conversations(truth: Truth) -> list[TwoTurns]:
    """Twenty recorded ones, or six of the project's own where those are not there; all of it in five minutes."""
    turns: list[Sequence[str]] = list(OURS)
    if why_absent(QUESTIONS) is None:
        with gzip.open(TRACES / QUESTIONS, "rt", encoding="utf-8") as lines:
            turns = [json.loads(line)["turns"] for line in lines][:80:4]
        assert len(turns) == 20
    found = []
    for first, second in turns:
        ids = truth.first_prompt(first)
        answer = truth.generated(ids)
        more = ids + answer + truth.next_turn(answer, second)
        found.append(TwoTurns(ids, answer, more, truth.generated(more)))
    return found


def test_conversations_of_two_turns_are_answered_alike_in_one_batch(
    conversations: list[TwoTurns], engine: Engine
) -> None:
    firsts = engine.generate([each.first for each in conversations], max_new_tokens=NUM_NEW)
    assert [request.tokens for request in firsts] == [each.first_answer for each in conversations]
    seconds = engine.generate([each.second for each in conversations], max_new_tokens=NUM_NEW)
    assert [request.tokens for request in seconds] == [each.second_answer for each in conversations]
    for request, each in zip(seconds, conversations, strict=True):
        assert request.num_computed_tokens == len(each.second) - len(each.first) - len(each.first_answer) + 1
    check_all_free(engine)


def test_they_are_answered_alike_where_pages_are_short(conversations: list[TwoTurns], truth: Truth) -> None:
    some = sorted(conversations, key=lambda each: len(each.second))[:8]
    num_pages = (len(some[-1].second) + NUM_NEW) // 16 + 4
    with engine_of(truth, num_pages=num_pages, max_requests=8) as engine:
        seconds = engine.generate([each.second for each in some], max_new_tokens=NUM_NEW)
        assert [request.tokens for request in seconds] == [each.second_answer for each in some]
        assert engine.cache.stats.num_evicted_pages > 0
        check_all_free(engine)


def test_eight_turns_compute_their_new_tokens_exactly_and_are_answered_alike(truth: Truth) -> None:
    ids = truth.first_prompt(SCRIPT[0])
    turns: list[tuple[list[int], list[int], list[int]]] = []  # prompt, what is new in it, answer
    new = ids
    for message in [*SCRIPT[1:], ""]:
        answer = truth.generated(ids)
        turns.append((ids, new, answer))
        new = truth.next_turn(answer, message)
        ids = ids + answer + new
    with engine_of(truth, num_pages=256) as engine:
        for number, (prompt, added, answer) in enumerate(turns):
            (request,) = engine.generate([prompt], max_new_tokens=NUM_NEW)
            assert request.tokens == answer
            # The last token of an answer has no KV until it is fed back.
            assert request.num_computed_tokens == len(added) + (number > 0)
        fork, other = engine.submit(prompt, max_new_tokens=NUM_NEW), None
        other = engine.fork(fork, sampling=Sampling())
        assert [each.tokens for each in engine.wait([fork, other])] == [answer, answer]
        check_all_free(engine)


def test_logits_after_seven_cached_turns_are_within_1e_4(truth: Truth) -> None:
    ids = truth.first_prompt(" ".join(SCRIPT))
    with engine_of(truth, num_pages=64) as engine:
        engine.generate([ids[:-9]], max_new_tokens=1)
        seen: list[torch.Tensor] = []
        hook = truth.model.register_forward_hook(lambda _, __, output: seen.append(output.logits[0]))
        (request,) = engine.generate([ids], max_new_tokens=6, stop_tokens=())
        hook.remove()
    assert request.num_cached_tokens == len(ids) - 9
    want = truth.logits(ids + request.tokens[:-1], len(ids) - 1)
    torch.testing.assert_close(torch.cat(seen), want, atol=1e-4, rtol=0)


def test_text_comes_back_as_text(engine: Engine) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = engine.generate([messages], max_new_tokens=16)
    assert answer.text == "The capital of France is Paris."
    assert "".join(piece.text for piece in engine.stream(messages, max_new_tokens=16)) == answer.text
