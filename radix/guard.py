r"""Where a new prompt leaves the tokens that a conversation holds, and why it probably does.

A chat template renders all messages anew for each turn. If it renders an earlier one in another way, everything after
that place is computed again, in silence, in every turn:

    held    … <think>Paris, as I recall</think>Paris.      given    … Paris.<|im_end|>\n<|im_start|>user …
              └ position 57: 12 tokens are lost, a thinking block was taken out
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from attrs import frozen

from radix.tokens import TOKEN_BYTES, common_bytes, token_ids

if TYPE_CHECKING:
    from radix.show import Decode

__all__ = ["Break", "Cause", "RetokenisationWarning", "compare"]

Cause: TypeAlias = Literal[
    "cut short", "retokenised", "thinking taken out", "text taken out", "text put in", "beginning changed", "changed"
]

#: what each cause is in words, and what to do about it
_WORDS: dict[Cause, str] = {
    "cut short": "the prompt ends before what is held: call rollback where messages are taken back",
    "retokenised": "it is the same text in other tokens: append the tokens of an answer as they were generated",
    "thinking taken out": "a thinking block was taken out of an earlier answer: keep it in the messages",
    "text taken out": "text was taken out of an earlier message",
    "text put in": "text was put into or before an earlier message",
    "beginning changed": "the beginning is another: a date, a list of tools or a system prompt that is not the same",
    "changed": "an earlier message is another, or the chat template renders it in another way than before",
}

_AROUND = 8  # tokens shown on each side
_MOST = 4096  # tokens looked at to find the cause
_ANCHOR, _LEAST = 24, 4  # characters by which text that moved is recognised, and fewer if it ends before


class RetokenisationWarning(UserWarning):
    """A prompt does not begin with the tokens that its conversation holds: part of them is computed again."""


@frozen
class Break:
    """A prompt left what a conversation holds.

    Attributes:
        position: the first token that differs; everything before it is reused.
        num_lost_tokens: tokens held from there on.
        before: up to eight tokens before that place.
        held: up to eight tokens that were held there.
        given: up to eight tokens that the prompt has there; none if it ends.
        texts: `before`, `held` and `given` decoded, if there was something to decode with.
        cause: the likely one. Without texts only `cut short`, `beginning changed` and `changed` are told apart.
    """

    position: int
    num_lost_tokens: int
    before: tuple[int, ...]
    held: tuple[int, ...]
    given: tuple[int, ...]
    texts: tuple[str, str, str] | None
    cause: Cause

    def __str__(self) -> str:
        """In words, on one line."""
        ids = (str(list(side)) for side in (self.before, self.held, self.given))
        before, held, given = map(repr, self.texts) if self.texts else ids
        lost = f"{self.num_lost_tokens:,} token{'s' * (self.num_lost_tokens != 1)}"
        where = f"at token {self.position:,}, after {before}: held {held}, given {given if self.given else 'nothing'}"
        return f"the prompt leaves what is held {where}. {lost} cannot be reused; {_WORDS[self.cause]}"


def compare(held: bytes, given: bytes, *, num_first: int, decode: Decode | None) -> Break | None:
    """None if `given` begins with all of `held`; else where and probably why it does not.

    Args:
        held: the tokens of a conversation, as a key.
        given: those of a new prompt.
        num_first: how many of the held tokens came first, with the system prompt.
        decode: turns token ids into text.

    Cost: a comparison; where they differ, decoding up to 4,096 tokens of each.
    """
    common = common_bytes(held, given)
    if common == len(held):
        return None
    at, span = common // TOKEN_BYTES, _AROUND
    mine, theirs = token_ids(held), token_ids(given)
    sides = [side.tolist() for side in (mine[max(0, at - span) : at], mine[at : at + span], theirs[at : at + span])]
    before, there, instead = map(tuple, sides)
    texts = (decode(sides[0]), decode(sides[1]), decode(sides[2])) if decode else None
    cause: Cause | None = "cut short" if common == len(given) else None
    if cause is None and decode is not None:
        first = max(0, at - span)  # some tokens earlier, as a token alone may not spell what it does among others
        cause = _cause(decode(mine[first : at + _MOST].tolist()), decode(theirs[first : at + _MOST].tolist()))
    cause = cause or ("beginning changed" if at < num_first else "changed")
    return Break(at, len(mine) - at, before, there, instead, texts, cause)


def _cause(held: str, given: str) -> Cause | None:
    """What the texts tell, from a little before where they differ."""
    if given.startswith(held):
        return "retokenised"
    at = next((i for i, (a, b) in enumerate(zip(held, given, strict=False)) if a != b), min(len(held), len(given)))
    held, given = held[at:], given[at:]
    gone = _shift(held, given)
    if gone:
        return "thinking taken out" if "think" in held[:gone].lower() else "text taken out"
    return "text put in" if _shift(given, held) else None


def _agree(text: str, other: str) -> bool:
    """Whether one of them goes on from the other."""
    return text.startswith(other) or other.startswith(text)


def _shift(longer: str, shorter: str) -> int:
    """How much of `longer` comes before what `shorter` begins with, as far as either goes; 0 if that is not there."""
    at = longer.find(shorter[:_LEAST], 1) if len(shorter) >= _LEAST else -1
    while at > 0 and not _agree(longer[at : at + _ANCHOR], shorter[:_ANCHOR]):
        at = longer.find(shorter[:_LEAST], at + 1)
    return max(at, 0)
