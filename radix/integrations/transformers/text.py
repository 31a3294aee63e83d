"""Text to tokens and back: prompts in three forms, and text that grows with the tokens.

A character may take several tokens, and a token may change how the one before it is spelled. So new text is the
difference between decoding a few earlier tokens with and without the new ones, and is held back while it ends in an
incomplete character:

    tokens   … h e l l o | 0xF0 0x9F | 0x98 0x80        decoded from `begin`, without and with those after `end`
    text       "hello"     ""          "😀"
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from radix.tokens import Tokens, as_key, token_ids
from seqattn.errors import BadValueError, TokenError

if TYPE_CHECKING:
    import numpy.typing as npt

    from radix.integrations.transformers.model import Model

__all__ = ["Prompt", "TextStream", "Tokenizer", "as_texts", "as_token_set", "decode", "encode", "end_tokens", "render"]

#: a tokenizer of transformers; called, and asked for `decode` and `apply_chat_template`
Tokenizer: TypeAlias = Any
#: token ids, a text, or messages as chat templates take them: [{"role": "user", "content": "…"}, …]
Prompt: TypeAlias = "Tokens | str | Sequence[dict[str, Any]]"

_INCOMPLETE = "\ufffd"
#: tokens after which an incomplete character is none: UTF-8 has at most four bytes for one
_MOST_HELD = 8
#: tokens that are decoded to see whether the newest adds text, where many before it have added none
_FEW = 2 * _MOST_HELD


def encode(tokenizer: Tokenizer | None, prompt: Prompt, vocab_size: int) -> npt.NDArray[np.int32]:
    """The token ids of a prompt, int32, not empty.

    Raises:
        BadValueError: a text or messages without a tokenizer, or messages that its chat template cannot render.
        TokenError: none, or not token ids of this model.
    """
    given: Any = prompt
    is_chat = isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], dict)
    if isinstance(given, str) or is_chat:
        if tokenizer is None:
            raise BadValueError("a text needs a tokenizer: make the engine with one, or give token ids")
        text, is_raw = (given, True) if isinstance(given, str) else (render(tokenizer, given), False)
        given = tokenizer(text, add_special_tokens=is_raw)["input_ids"]
    ids = token_ids(as_key(given))
    if not len(ids):
        raise TokenError("an empty prompt cannot be served: give at least one token")
    if ids.max() >= vocab_size:
        at = int(ids.argmax())
        raise TokenError(f"token id {ids[at]} at position {at} is not in the model's vocabulary of {vocab_size}")
    return ids


def render(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> str:
    """The text of messages, ready for an answer.

    Raises:
        BadValueError: there is no chat template, or it does not take these messages.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may raise anything
        raise BadValueError(f"the tokenizer's chat template cannot render these messages: {error}") from error
    return text


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Text of tokens, without special ones."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def as_token_set(tokens: Collection[int]) -> frozenset[int]:
    """Token ids as a set; raises TokenError for anything else."""
    given: Any = list(tokens) if isinstance(tokens, Collection) and not isinstance(tokens, str) else tokens
    return frozenset(token_ids(as_key(given)).tolist())


def as_texts(texts: Sequence[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Stop texts; raises BadValueError for anything else, and without a tokenizer."""
    found = () if isinstance(texts, str) else tuple(texts)
    if tokenizer is None or not found or not all(isinstance(text, str) and text for text in found):
        raise BadValueError(f"stop_texts must be texts, none of them empty, and need a tokenizer: {texts!r}")
    return found


class TextStream:
    """The text of a growing list of tokens; amortised O(1) decoded tokens for each new one, also where they give none.

    Args:
        tokenizer: what decodes.
        stops: texts to look for, none of them empty.

    Attributes:
        text: what is certain so far; the beginning of the text of all tokens.
        stop: where the first stop text begins in `text`; None while there is none.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.text = ""
        self.stop: int | None = None
        self._tokens: list[int] = []
        self._begin = self._end = 0
        self._num_held = 0  # tokens in a row behind which the text ended with an incomplete character

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def push(self, tokens: Sequence[int], *, is_last: bool = False) -> None:
        """Adds tokens. What ends in an incomplete character waits for the next ones, unless these are the last."""
        num_old = len(self.text)
        for token in tokens:
            self._tokens.append(token)
            if self._adds():
                self._grow(is_last=False)
        if is_last:
            self._grow(is_last=True)
        self._look(num_old)

    def _adds(self) -> bool:
        """Whether the newest token may add text. After a long run without any, only a few tokens are decoded to see."""
        begin = len(self._tokens) - _FEW
        if begin <= self._begin:
            return True
        few = self._tokens[begin:]
        return decode(self.tokenizer, few) != decode(self.tokenizer, few[:-1])

    def _grow(self, *, is_last: bool) -> None:
        """Decodes what is new, if it is whole."""
        before = decode(self.tokenizer, self._tokens[self._begin : self._end])
        now = decode(self.tokenizer, self._tokens[self._begin :])
        self._num_held = self._num_held + 1 if now.endswith(_INCOMPLETE) else 0
        if len(now) > len(before) and (is_last or not 0 < self._num_held < _MOST_HELD):
            self._begin, self._end = self._end, len(self._tokens)
            self._num_held = 0
            self.text += now[len(before) :]

    def _look(self, num_old: int) -> None:
        """Looks for stop texts that end in what is new."""
        if self.stop is None and self.stops:
            begin = max(0, num_old - max(map(len, self.stops)) + 1)
            found = [at for at in (self.text.find(stop, begin) for stop in self.stops) if at >= 0]
            self.stop = min(found, default=None)

    def certain(self) -> int:
        """How much of `text` is no part of a stop text, nor the possible beginning of one."""
        if self.stop is not None:
            return self.stop
        longest = max(map(len, self.stops), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self.stops):
                return len(self.text) - size
        return len(self.text)


def end_tokens(model: Model, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The end tokens of the generation config, else of the tokenizer."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, (list, tuple)) else [found])
