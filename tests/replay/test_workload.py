"""The chat workloads: seeded, growing turn by turn, shared where they say so."""

from __future__ import annotations

import itertools

import attrs
import numpy as np
import pytest

from radix.replay.workload import ChatTurn, ChatWorkload, UniformChat

SMALL = ChatWorkload(num_conversations=30, num_turns=4, num_live=5, system_len=(20, 30), vocab_size=1000)


def prompts(turns: list[ChatTurn]) -> list[tuple[int, ...]]:
    return [tuple(turn.prompt.tolist()) for turn in turns]


def whole(turn: ChatTurn) -> tuple[int, ...]:
    return tuple(turn.as_request().token_ids().tolist())


def depth(turn: ChatTurn, earlier: list[ChatTurn]) -> int:
    """Turns before this one: the longest chain of earlier turns that it goes on from."""
    prompt = tuple(turn.prompt.tolist())
    return sum(prompt[: len(whole(before))] == whole(before) for before in earlier)


def test_the_same_seed_gives_the_same_turns_and_another_one_others() -> None:
    first, second, other = (list(work.turns()) for work in (SMALL, SMALL, attrs.evolve(SMALL, seed=1)))
    assert prompts(first) == prompts(second)
    assert all((a.reply == b.reply).all() for a, b in zip(first, second, strict=True))
    assert prompts(first) != prompts(other)


def test_every_prompt_is_a_system_prompt_or_goes_on_from_an_earlier_turn() -> None:
    turns = list(SMALL.turns())
    depths = [depth(turn, turns[:i]) for i, turn in enumerate(turns)]
    assert max(depths) == SMALL.num_turns - 1
    assert {turn.prompt.dtype for turn in turns} == {np.dtype(np.int32)} == {turn.reply.dtype for turn in turns}
    first = [turn.prompt[:20].tobytes() for turn, past in zip(turns, depths, strict=True) if past == 0]
    assert len(set(first)) == SMALL.num_system_prompts


def test_system_prompts_of_lower_number_are_used_more_often() -> None:
    turns = ChatWorkload(num_conversations=300, num_turns=1, fork_rate=0.0).turns()
    counts = sorted(np.unique([turn.prompt[:20].tobytes() for turn in turns], return_counts=True)[1], reverse=True)
    assert counts[0] > 1.4 * counts[1] > 1.4 * counts[3]


def test_a_fork_goes_on_from_a_turn_that_another_conversation_went_on_from_too() -> None:
    def num_forks(fork_rate: float) -> int:
        turns = list(attrs.evolve(SMALL, fork_rate=fork_rate).turns())
        sources = [max((whole(b) for b in turns[:i] if whole(b) == prompt[: len(whole(b))]), key=len, default=())
                   for i, prompt in enumerate(prompts(turns))]  # fmt: skip
        return sum(count - 1 for source, count in _counts(sources) if source)

    assert num_forks(0.0) == 0
    assert num_forks(0.9) > 10


def _counts(items: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], int]]:
    return [(key, len(list(group))) for key, group in itertools.groupby(sorted(items))]


def test_without_forks_every_conversation_has_all_its_turns() -> None:
    turns = list(attrs.evolve(SMALL, fork_rate=0.0).turns())
    assert len(turns) == SMALL.num_conversations * SMALL.num_turns


def test_lengths_keep_to_their_bounds_and_use_them() -> None:
    turns = list(attrs.evolve(SMALL, reply_len=(3, 5), num_conversations=60).turns())
    assert {len(turn.reply) for turn in turns} == {3, 4, 5}


@pytest.mark.parametrize("num_live", [1, 8, 100])
def test_at_most_so_many_conversations_are_live(num_live: int) -> None:
    chat = UniformChat(num_live=num_live, num_conversations=20, num_turns=3, system_len=5, user_len=4, reply_len=2)
    left: dict[tuple[int, ...], int] = {}
    most = 0
    for turn in chat.turns():
        key = tuple(turn.prompt[5:9].tolist())  # a conversation's first question
        left[key] = left.get(key, chat.num_turns) - 1
        most = max(most, sum(turns > 0 for turns in left.values()) + (left[key] == 0))
    assert list(left.values()) == [0] * 20
    assert most <= num_live
    assert most > 0.7 * min(num_live, 20)


def test_the_uniform_chat_counts_its_distinct_tokens() -> None:
    chat = UniformChat(num_conversations=7, num_turns=2, system_len=10, user_len=3, reply_len=4)
    assert chat.num_distinct_tokens == 10 + 7 * 2 * (3 + 4)
    seen = {whole(turn)[: end + 1] for turn in chat.turns() for end in range(len(whole(turn)))}
    assert len(seen) == chat.num_distinct_tokens


def test_the_uniform_chat_is_the_one_whose_figures_are_known() -> None:
    """Its first draws, and its capacity: 30 % of the tokens, a multiple of 64 of them."""
    first = next(UniformChat().turns())
    draw = np.random.default_rng(123)
    assert first.prompt[:1000].tolist() == draw.integers(0, 150_000, 1000, dtype=np.int64).tolist()
    assert len(first.prompt) == 1100
    assert len(first.reply) == 200
    assert [UniformChat().capacity_pages(page_size) for page_size in (1, 16, 64)] == [360_256, 22_516, 5_629]
