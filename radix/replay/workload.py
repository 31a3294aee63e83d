"""Seeded chat workloads: conversations that begin with a system prompt, grow turn by turn, and sometimes fork.

    system 0 ─┬─ user ─ reply ─ user ─ reply ─┬─ user ─ reply         conversation 0
              │                               └─ user ─ reply         conversation 7, a fork of 0 after two turns
              └─ user ─ reply                                         conversation 1
    system 1 ─── user ─ reply ─ user ─ reply                          conversation 2

Some conversations are live at a time; the next turn is that of a random one, and when it ends the next one enters. The
more are live, the longer a prefix must wait for its next use: that is what makes eviction hurt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from radix.replay.request import TokenRequest

if TYPE_CHECKING:
    TokenArray: TypeAlias = npt.NDArray[np.int32]

__all__ = ["ChatTurn", "ChatWorkload", "UniformChat"]


@attrs.frozen(eq=False)
class ChatTurn:
    """One call of a chat model.

    Attributes:
        prompt: the whole conversation so far with the new question, int32.
        reply: what the model answers, int32.
    """

    prompt: TokenArray
    reply: TokenArray

    def as_request(self) -> TokenRequest:
        """Prompt and reply as one prompt: what the cache holds after the turn."""
        return TokenRequest(np.concatenate([self.prompt, self.reply]))


@attrs.frozen(kw_only=True)
class ChatWorkload:
    """A chat workload; the same fields give the same tokens.

    Attributes:
        num_conversations: conversations in all.
        num_turns: turns of each conversation, those before a fork included.
        num_live: conversations that take turns at the same time.
        num_system_prompts: system prompts; number i is used 1 / (i + 1) times as often as number 0.
        system_len: tokens of a system prompt, from and to (both included); so the next two.
        user_len: tokens of a question.
        reply_len: tokens of a reply.
        fork_rate: share of conversations that go on from the middle of an earlier one instead of starting anew.
        vocab_size: token ids are drawn from [0, vocab_size).
        seed: of everything that is drawn.
    """

    num_conversations: int = 200
    num_turns: int = 6
    num_live: int = 32
    num_system_prompts: int = 4
    system_len: tuple[int, int] = (400, 1200)
    user_len: tuple[int, int] = (10, 120)
    reply_len: tuple[int, int] = (40, 300)
    fork_rate: float = 0.2
    vocab_size: int = 32_000
    seed: int = 0

    def turns(self) -> Iterator[ChatTurn]:
        """Yields the turns of all conversations in the order in which they are served."""
        pick, draw = random.Random(self.seed), np.random.default_rng(self.seed)
        systems = [self._tokens(draw, self.system_len) for _ in range(self.num_system_prompts)]
        #: system prompt, user, reply, user, reply, … of every conversation that has begun
        begun: dict[int, list[TokenArray]] = {}
        for k in _interleave(self.num_conversations, self.num_live, pick, lambda k: self._is_over(begun[k])):
            if k not in begun:
                begun[k] = self._beginning(pick, systems, list(begun.values()))
            user, reply = self._tokens(draw, self.user_len), self._tokens(draw, self.reply_len)
            yield ChatTurn(np.concatenate([*begun[k], user]), reply)
            begun[k] += [user, reply]

    def _beginning(
        self, pick: random.Random, systems: list[TokenArray], earlier: list[list[TokenArray]]
    ) -> list[TokenArray]:
        """What a new conversation begins with: some turns of an earlier one, or a system prompt."""
        if earlier and pick.random() < self.fork_rate:
            parts = pick.choice(earlier)
            most = min(len(parts) // 2, self.num_turns - 1)
            return parts[: 1 + 2 * pick.randint(0, most)]
        weights = [1 / (i + 1) for i in range(len(systems))]
        return pick.choices(systems, weights)[:1]

    def _is_over(self, parts: list[TokenArray]) -> bool:
        return len(parts) // 2 >= self.num_turns

    def _tokens(self, draw: np.random.Generator, between: tuple[int, int]) -> TokenArray:
        length = draw.integers(*between, endpoint=True)
        return draw.integers(0, self.vocab_size, length, dtype=np.int32)


@attrs.frozen(kw_only=True)
class UniformChat:
    """A chat workload in which every length is fixed and all conversations share one system prompt.

    Other engines' caches were measured with this one, so its draws and their order never change. A cache of 30 % of its
    tokens loses nothing while 64 conversations are live, and much when all are.
    """

    num_live: int = 64
    num_conversations: int = 500
    num_turns: int = 8
    system_len: int = 1000
    user_len: int = 100
    reply_len: int = 200

    @property
    def num_distinct_tokens(self) -> int:
        """Tokens of all conversations with the system prompt counted once."""
        return self.system_len + self.num_conversations * self.num_turns * (self.user_len + self.reply_len)

    def capacity_pages(self, page_size: int) -> int:
        """Pages of a cache for 30 % of the distinct tokens, in whole multiples of 64 tokens."""
        return int(self.num_distinct_tokens * 0.30) // 64 * 64 // page_size

    def turns(self) -> Iterator[ChatTurn]:
        """Yields the turns of all conversations in the order in which they are served."""
        draw = np.random.default_rng(123)
        system = self._tokens(draw, self.system_len)
        users, replies = (
            [[self._tokens(draw, length) for _ in range(self.num_turns)] for _ in range(self.num_conversations)]
            for length in (self.user_len, self.reply_len)
        )
        parts = [[system] for _ in range(self.num_conversations)]
        pick = random.Random(1)
        for k in _interleave(self.num_conversations, self.num_live, pick, lambda k: len(parts[k]) > 2 * self.num_turns):
            turn = len(parts[k]) // 2
            user, reply = users[k][turn], replies[k][turn]
            yield ChatTurn(np.concatenate([*parts[k], user]), reply)
            parts[k] += [user, reply]

    @staticmethod
    def _tokens(draw: np.random.Generator, length: int) -> TokenArray:
        return draw.integers(0, 150_000, length, dtype=np.int64).astype(np.int32)


def _interleave(num_all: int, num_live: int, pick: random.Random, is_over: Callable[[int], bool]) -> Iterator[int]:
    """Yields whose turn it is; `is_over(k)` is asked after each turn of k."""
    live = list(range(min(num_live, num_all)))
    waiting = iter(range(len(live), num_all))
    while live:
        i = pick.randrange(len(live))
        yield live[i]
        if is_over(live[i]):
            entering = next(waiting, None)
            if entering is None:
                live.pop(i)
            else:
                live[i] = entering
