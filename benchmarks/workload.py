"""The work that every implementation gets: same seeds, same token ids, same order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Chat", "Ids", "chat", "ids", "leaves"]

#: token ids as drawn, int64; each implementation turns them into what its own scheduler holds, outside the timing
Ids: TypeAlias = "npt.NDArray[np.int64]"

VOCABULARY = 150_000


def ids(num_tokens: int, seed: int) -> Ids:
    """Random token ids, int64 [num_tokens]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, num_tokens, dtype=np.int64)


def leaves(num_leaves: int, num_tokens: int, seed: int = 5) -> Iterator[Ids]:
    """Prompts that all differ in their first token."""
    generator = np.random.default_rng(seed)
    for first in range(num_leaves):
        prompt = generator.integers(0, VOCABULARY, num_tokens, dtype=np.int64)
        prompt[0] = VOCABULARY + first
        yield prompt


class Turn(NamedTuple):
    """One request: everything said before plus the user's new tokens, and the reply that will follow."""

    prompt: Ids
    reply: Ids


class Chat(NamedTuple):
    """A chat workload: requests in the order of arrival, and how many tokens the cache has room for."""

    turns: list[Turn]
    capacity: int


def chat(num_conversations: int = 500, num_turns: int = 8, num_live: int = 64, *, scale: float = 1.0) -> Chat:
    """Conversations over one system prompt of 1,000 tokens: 100 of the user and 200 of reply a turn, times `scale`.

    `num_live` conversations run at a time and take turns at random; when one ends the next begins. The capacity is 30 %
    of all distinct tokens.
    """
    generator = np.random.default_rng(123)

    def draw(num_tokens: int) -> Ids:
        return generator.integers(0, VOCABULARY, round(num_tokens * scale), dtype=np.int64)

    system = draw(1000)
    questions = [[draw(100) for _ in range(num_turns)] for _ in range(num_conversations)]
    replies = [[draw(200) for _ in range(num_turns)] for _ in range(num_conversations)]
    history = [system] * num_conversations
    turns = []
    for i, at in _order(num_conversations, num_turns, num_live):
        prompt = np.concatenate((history[i], questions[i][at]))
        turns.append(Turn(prompt, replies[i][at]))
        history[i] = np.concatenate((prompt, replies[i][at]))
    num_distinct = len(system) + num_conversations * num_turns * round(300 * scale)
    return Chat(turns, int(num_distinct * 0.30) // 64 * 64)


def _order(num_conversations: int, num_turns: int, num_live: int) -> Iterator[tuple[int, int]]:
    """Which conversation speaks, and which of its turns that is."""
    dice, live = random.Random(1), list(range(min(num_live, num_conversations)))
    coming, done = iter(range(len(live), num_conversations)), [0] * num_conversations
    while live:
        at = dice.randrange(len(live))
        yield live[at], done[live[at]]
        done[live[at]] += 1
        if done[live[at]] == num_turns:
            following = next(coming, None)
            if following is None:
                live.pop(at)
            else:
                live[at] = following
