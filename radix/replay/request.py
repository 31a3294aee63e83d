"""Requests of a trace: prompts as token ids, made when they are asked for.

A trace of block hashes is small (one number for 64 or 512 tokens) and its prompts are large, so a request keeps the
hashes and expands them into token ids only while it is replayed:

    BlockRequest(blocks=[0, 7], block_size=4, num_tokens=6)            token ids 0 1 2 3 | 28 29
    BlockRequest(blocks=[0], block_size=4, num_tokens=6, tail_start=80)          0 1 2 3 | 80 81

Two blocks never share a token, so a tree of tokens finds exactly the blocks that are equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    TokenArray: TypeAlias = npt.NDArray[np.int32]
    #: bytes in the order of the tokens, then two numbers that break ties.
    SortKey: TypeAlias = tuple[bytes, int, int]

__all__ = ["BlockRequest", "Request", "TokenRequest", "common_prefix_len"]


class Request(ABC):
    """One prompt of a trace."""

    #: length of the prompt in tokens; 0 is legal.
    num_tokens: int

    @abstractmethod
    def token_ids(self) -> TokenArray:
        """The prompt: a new int32 array [num_tokens] that the caller owns. O(num_tokens), in numpy."""

    @abstractmethod
    def sort_key(self) -> SortKey:
        """Sorting one trace by this puts every prompt right before those that begin with it."""

    @abstractmethod
    def common_prefix_len(self, other: Any) -> int:  # noqa: ANN401  one class in one trace: each names its own
        """How many leading tokens this prompt and another of the same trace (and class) share."""


@attrs.frozen(eq=False)
class TokenRequest(Request):
    """A prompt whose token ids are known.

    Attributes:
        tokens: unsigned bytes or int32 ids, flat. Text is kept as its UTF-8 bytes: a quarter of the memory.
    """

    tokens: npt.NDArray[np.uint8] | TokenArray

    @property
    def num_tokens(self) -> int:  # type: ignore[override]  # read-only here: derived from the tokens
        """Length of the prompt in tokens."""
        return len(self.tokens)

    def token_ids(self) -> TokenArray:
        """The prompt: a new int32 array [num_tokens]."""
        return self.tokens.astype(np.int32)

    def sort_key(self) -> SortKey:
        """The ids as big-endian bytes, which compare as the ids do."""
        return self.tokens.astype(self.tokens.dtype.newbyteorder(">")).tobytes(), 0, 0

    def common_prefix_len(self, other: TokenRequest) -> int:
        """How many leading tokens both prompts share."""
        return common_prefix_len(self.tokens, other.tokens)


@attrs.frozen(eq=False, kw_only=True)
class BlockRequest(Request):
    """A prompt known by the hashes of its blocks.

    Attributes:
        blocks: block numbers, int32, root first; block b stands for token ids b*block_size to (b+1)*block_size - 1.
        block_size: tokens in a block.
        num_tokens: length of the prompt. Shorter than the blocks cuts the last one; longer adds a tail.
        tail_start: first token id of the tail, whose ids no other request has; 0 where there is no tail.
    """

    blocks: TokenArray
    block_size: int
    num_tokens: int
    tail_start: int = 0

    def token_ids(self) -> TokenArray:
        """The prompt: a new int32 array [num_tokens]."""
        num_block_tokens = len(self.blocks) * self.block_size
        ids = np.empty(max(num_block_tokens, self.num_tokens), dtype=np.int32)
        grid = ids[:num_block_tokens].reshape(-1, self.block_size)
        np.add(self.blocks[:, None] * np.int32(self.block_size), np.arange(self.block_size, dtype=np.int32), out=grid)
        num_tail_tokens = self.num_tokens - num_block_tokens
        if num_tail_tokens > 0:
            ids[num_block_tokens:] = np.arange(self.tail_start, self.tail_start + num_tail_tokens, dtype=np.int32)
        return ids[: self.num_tokens]

    def sort_key(self) -> SortKey:
        """Blocks first, then prompts without a tail, then shorter ones."""
        return self.blocks.astype(">i4").tobytes(), self.tail_start, self.num_tokens

    def common_prefix_len(self, other: BlockRequest) -> int:
        """How many leading tokens both prompts share; the tail is shared only with another reading of the request."""
        num_blocks = common_prefix_len(self.blocks, other.blocks)
        shortest = min(self.num_tokens, other.num_tokens)
        if num_blocks == len(self.blocks) == len(other.blocks) and self.tail_start == other.tail_start:
            return shortest
        return min(num_blocks * self.block_size, shortest)


def common_prefix_len(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> int:
    """How many leading entries two flat arrays share; O(length) in numpy."""
    shortest = min(len(left), len(right))
    if not shortest:
        return 0
    differs = left[:shortest] != right[:shortest]
    first = int(differs.argmax())
    return first if differs[first] else shortest
