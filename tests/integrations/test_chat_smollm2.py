"""Eight turns with a real model, in messages: what each computes, and how much sooner its first token comes."""

from __future__ import annotations

import time

import pytest

from radix import PrefixCache
from radix.integrations.transformers import Chat, Engine, manager_for, sessions_for
from tests.integrations import smollm2
from tests.integrations.models import check_all_free

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(smollm2.why_absent() is not None, reason=f"SmolLM2: {smollm2.why_absent()}"),
]

SCRIPT = [
    "My name is Ada and I have a garden. Write me a long welcome.",
    "Which vegetables can I grow from seed in spring, and how?",
    "What does a plant need besides water?",
    "Write down all that I should do in April.",
    "And in May?",
    "What is my name?",
    "Do I have a garden?",
    "Say goodbye.",
]


def test_eight_turns_compute_what_is_new_and_answer_at_least_five_times_sooner() -> None:
    """Time is the CPU time of the one thread that computes: other processes do not disturb it."""
    model, tokenizer = smollm2.load()
    cache = PrefixCache(manager_for(model, num_pages=512))
    with Engine(model, tokenizer, cache, clock=time.thread_time) as engine:
        engine.generate([" ".join(SCRIPT)], max_new_tokens=2)
        session = sessions_for(engine).open("ada")
        chat = Chat(engine, session)
        gains: list[float] = []
        for turn, message in enumerate(SCRIPT):
            num_held = session.num_tokens
            warm = chat.ask(message, max_new_tokens=72)
            (cold,) = engine.generate([warm.prompt], max_new_tokens=1, namespace=turn)
            assert cold.tokens == warm.tokens[:1]
            assert warm.num_computed_tokens == len(warm.prompt) - num_held + (turn > 0)
            assert warm.time_to_first_token
            assert cold.time_to_first_token
            gains.append(cold.time_to_first_token / warm.time_to_first_token)
        assert min(gains[4:]) >= 5, f"the first token came sooner by {gains}"
        assert session.last_break is None
        session.discard()
        check_all_free(engine)
