"""Choosing the next token: the most likely one, or one drawn with a seed of the request's own.

A draw is one uniform number u in [0, 1) from the request's generator; the token is where the cumulated probability
passes u (inversion: Devroye, Non-Uniform Random Variate Generation, 1986, II.2). So a request's tokens depend on its
seed and its logits, whatever else is in the batch. The number belongs to the token: a step that is computed again,
since it failed or was taken back, chooses by the same one.
"""

from __future__ import annotations

import math
from contextlib import suppress
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import define, field

from seqattn.append import sent
from seqattn.counts import is_int
from seqattn.errors import BadValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = ["Draw", "Sampling", "choose_tokens"]

#: numbers that are made at a time
_BLOCK = 64


def _as_float(value: object) -> float:
    """A real number, of Python or numpy, as a float; NaN, which is in no range, for anything else, bools included."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    return math.nan


def _temperature(value: float) -> float:
    if not 0 <= (found := _as_float(value)) < math.inf:
        raise BadValueError(f"temperature must be a number of at least 0, not {value!r}: 0 is greedy")
    return found


def _top_k(value: int | None) -> int | None:
    if value is not None and (not is_int(value) or value < 1):
        raise BadValueError(f"top_k must be an integer of at least 1, or None for all tokens, not {value!r}")
    return None if value is None else int(value)


def _top_p(value: float) -> float:
    if not 0 < (found := _as_float(value)) <= 1:
        raise BadValueError(f"top_p must be in (0, 1], not {value!r}")
    return found


def _seed(value: int) -> int:
    if not is_int(value) or value < 0:
        raise BadValueError(f"seed must be an integer of at least 0, not {value!r}")
    return int(value)


@define(slots=True, frozen=True)
class Sampling:
    """How tokens are chosen; numbers of Python or numpy, kept as Python's.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token, the first of equals.
        top_k: only so many of the most likely tokens; None for all.
        top_p: only the fewest of the most likely tokens whose probabilities add up to this.
        seed: of the request's own generator. The same seed and prompt give the same tokens in any batch, but where
            floating-point noise moves a probability across the number that was drawn.

    Raises:
        BadValueError: a value out of range.
    """

    temperature: float = field(default=0.0, converter=_temperature)
    top_k: int | None = field(default=None, converter=_top_k)
    top_p: float = field(default=1.0, converter=_top_p)
    seed: int = field(default=0, converter=_seed)

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def is_cut(self) -> bool:
        """Whether only some of the tokens are kept."""
        return self.top_k is not None or self.top_p < 1


class Draw:
    """The sampling of one request: its options, and the numbers of its tokens.

    Args:
        sampling: the options.
        first: how many tokens the request has already.

    Raises:
        BadValueError: `sampling` is none.
    """

    __slots__ = ("_block", "_first", "sampling")

    def __init__(self, sampling: Sampling, first: int = 0) -> None:
        # Callers without type checks pass a temperature.
        given: object = sampling
        if not isinstance(given, Sampling):
            raise BadValueError(f"sampling must be a Sampling, not {given!r}")
        self.sampling = sampling
        self._first = first
        self._block: tuple[int, npt.NDArray[np.float64]] | None = None

    def uniform(self, nth: int) -> float:
        """The number in [0, 1) of the request's nth token: the same whenever and after whatever it is asked for."""
        number, place = divmod(nth - self._first, _BLOCK)
        block = self._block
        if block is None or block[0] != number:
            generator = np.random.PCG64(self.sampling.seed)
            self._block = block = number, np.random.Generator(generator.advance(number * _BLOCK)).random(_BLOCK)
        return block[1].item(place)


def choose_tokens(logits: torch.Tensor, draws: Sequence[Draw], nth: Sequence[int]) -> torch.Tensor:
    """A token for each row of logits [rows, vocabulary], int64 [rows] on their device; waits for nothing.

    Args:
        logits: in any floating dtype.
        draws: of the request of each row.
        nth: which of its tokens this is, from 0.

    Cost: an argmax, and for the rows that draw a softmax and a cumulated sum, with a sort where top_k or top_p is set.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [i for i, draw in enumerate(draws) if not draw.sampling.is_greedy]
    # Apart: a row draws in the order of the vocabulary or of its scores by its own options alone, whoever is beside it.
    for is_cut in (False, True):
        rows = [i for i in drawn if draws[i].sampling.is_cut == is_cut]
        if rows:
            index = sent(np.array(rows), logits.device)
            tokens[index] = _drawn_tokens(logits[index], [draws[i] for i in rows], [nth[i] for i in rows])
    return tokens


def _drawn_tokens(logits: torch.Tensor, draws: Sequence[Draw], nth: Sequence[int]) -> torch.Tensor:
    """A drawn token for each row, int64 [rows]; all of them are cut, or none is."""
    options = [draw.sampling for draw in draws]
    uniform = [draw.uniform(n) for draw, n in zip(draws, nth, strict=True)]
    most = logits.shape[-1]
    top_ks = [most if o.top_k is None else min(o.top_k, most) for o in options]  # a larger one need not fit a float
    numbers = [[o.temperature, o.top_p, k, u] for o, k, u in zip(options, top_ks, uniform, strict=True)]
    columns = sent(np.array(numbers, dtype=np.float64), logits.device)
    temperature, top_p, top_k, number = columns.unsqueeze(-1).unbind(1)
    scores = logits.double()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature  # at most 0: nothing is too large to divide
    order = None
    if options[0].is_cut:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        scores = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) >= top_k, -math.inf)
    cumulated = torch.softmax(scores, dim=-1).cumsum(dim=-1)
    # Where the tokens that are kept end: at the first whose sum reaches top_p. Rounding may leave the last sum below 1.
    kept = cumulated[:, -1:]
    if order is not None:
        last = torch.searchsorted(cumulated, torch.minimum(top_p, kept))
        kept = cumulated.gather(1, last.clamp(max=cumulated.shape[-1] - 1))
    place = torch.searchsorted(cumulated, number * kept, right=True).clamp(max=cumulated.shape[-1] - 1)
    return (place if order is None else order.gather(1, place)).squeeze(1)
