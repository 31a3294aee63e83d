"""One request: what was asked, what came of it, and where it stands."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import numpy as np
from attrs import define, field

from radix.integrations.transformers.sampling import Draw, Sampling
from radix.integrations.transformers.text import TextStream, Tokenizer, decode

if TYPE_CHECKING:
    import numpy.typing as npt

    Int32Array = npt.NDArray[np.int32]

__all__ = ["Options", "Piece", "Request"]


class Options(TypedDict, total=False):
    """The keywords of `Engine.submit`, which says what they mean."""

    max_new_tokens: int
    sampling: Sampling
    stop_tokens: Collection[int] | None
    stop_texts: Sequence[str]
    namespace: Hashable
    request_id: Hashable


class Piece(NamedTuple):
    """What a step added to a request.

    Attributes:
        tokens: the new token ids, in order; at least one, but in the last piece, which may only bring text.
        text: the text that is certain by now; characters whose bytes are incomplete come with a later piece. Empty
            without a tokenizer.
    """

    tokens: list[int]
    text: str


@define(slots=True, eq=False)
class Request:
    """A submitted prompt and its answer; fields are the engine's to write.

    Attributes:
        id: its sequence id in the cache while it runs; None until it is submitted, if the engine names it.
        prompt: its token ids, int32, not empty.
        namespace: under which it reuses and publishes.
        max_new_tokens: it ends with so many tokens.
        draw: how its tokens are chosen, and its generator.
        stop_tokens: it ends with any of these.
        watch: the text, where stop texts are looked for; None without any.
        arrival: its place in the order of submission; 0 before.
        tokens: generated so far; the token that stopped it is the last one.
        finish_reason: None while it waits or runs; "stop" (a stop token or text), "length" (`max_new_tokens`) or
            "cancelled".
        num_cached_tokens: prompt tokens that were reused when it first started; None before.
        num_computed_tokens: prompt tokens whose KV it has computed. After a preemption what is computed again counts
            again, generated tokens included.
        num_preemptions: how often it was stopped for lack of pages and put back.
        submitted_at: by the engine's clock, seconds; 0 before.
        first_token_at: likewise; None before the first token.
        finished_at: likewise.
    """

    id: Hashable
    prompt: Int32Array
    namespace: Hashable
    max_new_tokens: int
    draw: Draw
    stop_tokens: frozenset[int]
    tokenizer: Tokenizer | None
    watch: TextStream | None
    submitted_at: float = 0.0
    arrival: int = 0
    tokens: list[int] = field(factory=list)
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    num_cached_tokens: int | None = None
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    first_token_at: float | None = None
    finished_at: float | None = None
    #: tokens whose KV must be there before the next token is chosen, as of the last start
    todo: Int32Array = field(init=False)
    #: tokens whose KV is written
    num_done: int = 0
    #: forks that begin with its first token
    forks: list[Request] = field(factory=list)
    #: a request in prefill that will publish this many tokens of this prompt
    leader: tuple[Request, int] | None = None

    def __attrs_post_init__(self) -> None:
        self.todo = self.prompt

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens that are known have no KV yet, the newest one apart."""
        return self.num_done < len(self.todo)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from `submit` to the first token, waiting included; None before."""
        return None if self.first_token_at is None else self.first_token_at - self.submitted_at

    @property
    def text(self) -> str:
        """The answer so far without special tokens, cut before a stop text; O(tokens). Empty without a tokenizer."""
        if self.watch is not None:
            return self.watch.text[: self.watch.stop]
        return "" if self.tokenizer is None else decode(self.tokenizer, self.tokens)

    @property
    def all_tokens(self) -> Int32Array:
        """Prompt and answer, int32; O(tokens)."""
        return np.concatenate((self.prompt, np.array(self.tokens, dtype=np.int32)))

    def family(self) -> list[Request]:
        """Itself, and the forks that begin with its first token, forks of forks included."""
        if not self.forks:
            return [self]
        return [self, *(each for fork in self.forks if not fork.is_finished for each in fork.family())]

    @property
    def num_known(self) -> int:
        """Tokens but the newest, which has no KV yet; while it decodes, those that have."""
        return len(self.prompt) + len(self.tokens) - 1

    def tokens_of_text(self) -> list[int]:
        """The generated tokens, but those that a stop text cut off `text`, in whole or in part.

        Cost: that of decoding the answer, for each of those.
        """
        tokens, watch = self.tokens[:], self.watch
        while watch is not None and watch.stop is not None and len(decode(watch.tokenizer, tokens)) > watch.stop:
            tokens.pop()
        return tokens

    def take(self, token: int, now: float) -> None:
        """Adds the next token."""
        self.tokens.append(token)
        if self.first_token_at is None:
            self.first_token_at = now
        self.settle()

    def settle(self) -> None:
        """Ends with the newest token if it is a stop token, or the last."""
        if self.tokens and self.finish_reason is None:
            if self.tokens[-1] in self.stop_tokens:
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.max_new_tokens:
                self.finish_reason = "length"

    def read(self) -> None:
        """Reads the new tokens as text, where stop texts are looked for, and ends if there is one."""
        if self.watch is not None:
            self.watch.push(self.tokens[self.watch.num_tokens :], is_last=self.is_finished)
            if self.watch.stop is not None:
                self.finish_reason = "stop"

    def begin(self, num_cached_tokens: int) -> None:
        """It runs, with so many tokens of `todo` reused."""
        self.num_done = num_cached_tokens
        self.leader = None
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_cached_tokens

    def put_back(self) -> None:
        """It runs no more, and must know the KV of all its tokens again before it goes on."""
        self.todo, self.num_done = self.all_tokens, 0
        self.num_preemptions += 1

    def copy(self, new_id: Hashable, draw: Draw, now: float, arrival: int) -> Request:
        """Another request that stands where this one stands, but runs nowhere yet."""
        watch = None if self.watch is None else TextStream(self.watch.tokenizer, self.watch.stops)
        if watch is not None:
            watch.push(self.tokens)
        twin = Request(
            new_id,
            self.prompt,
            self.namespace,
            self.max_new_tokens,
            draw,
            self.stop_tokens,
            self.tokenizer,
            watch,
            now,
            arrival,
        )
        twin.tokens = self.tokens[:]
        return twin
