"""Drawn tokens: right frequencies, the options' effect, and seeds that mean the same in every batch."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from radix.integrations.transformers import Sampling
from radix.integrations.transformers.sampling import Draw, choose_tokens
from seqattn import BadValueError
from tests.integrations.models import engine_for, prompt

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]))
NUM_DRAWS = 20_000


def frequencies(sampling: Sampling, logits: torch.Tensor = LOGITS) -> np.ndarray[Any, Any]:
    """How often each token is drawn, by one request again and again."""
    draw = Draw(sampling)
    tokens = choose_tokens(logits.expand(NUM_DRAWS, -1), [draw] * NUM_DRAWS, range(NUM_DRAWS))
    return np.bincount(tokens, minlength=len(logits)) / NUM_DRAWS


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(temperature=1.0), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (Sampling(temperature=0.5), np.square([0.1, 0.4, 0.05, 0.25, 0.2]) / 0.275),
        (Sampling(temperature=1.0, top_k=2), [0, 40 / 65, 0, 25 / 65, 0]),
        (Sampling(temperature=1.0, top_k=99), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (Sampling(temperature=1.0, top_p=0.6), [0, 40 / 65, 0, 25 / 65, 0]),
        (Sampling(temperature=1.0, top_p=0.7), [0, 40 / 85, 0, 25 / 85, 20 / 85]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), [0, 40 / 65, 0, 25 / 65, 0]),
        (Sampling(temperature=1.0, top_p=1e-9), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: Sampling, want: list[float]) -> None:
    got = frequencies(sampling)
    assert np.abs(got - want).max() < 4 * 0.5 / np.sqrt(NUM_DRAWS)
    assert (got[np.asarray(want) == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1e-308, 1e-30, 1e-3])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_smaller_the_temperature_the_nearer_to_greedy(temperature: float, options: dict[str, Any]) -> None:
    logits = torch.cat((LOGITS + 100, torch.tensor([-torch.inf])))
    assert frequencies(Sampling(temperature=temperature, **options), logits)[1] == 1


def test_greedy_takes_the_first_of_equals_and_draws_nothing() -> None:
    assert choose_tokens(torch.tensor([[0.0, 2.0, 2.0]]), [Draw(Sampling())], [0]).tolist() == [1]
    mixed = [Draw(Sampling()), Draw(Sampling(temperature=5.0, seed=3)), Draw(Sampling())]
    assert [choose_tokens(LOGITS.expand(3, -1), mixed, [0, 4, 7])[i] for i in (0, 2)] == [1, 1]


def test_a_number_belongs_to_a_token_whenever_it_is_asked_for() -> None:
    random, draw = np.random.Generator(np.random.PCG64(5)), Draw(Sampling(temperature=1.0, seed=5), first=3)
    numbers = [random.random() for _ in range(300)]
    for nth in (3, 4, 4, 3, 66, 67, 66, 67, 68, 250, 302, 5):
        assert draw.uniform(nth) == numbers[nth - 3]


def test_an_impossible_token_is_never_drawn_not_even_by_the_largest_number() -> None:
    class Largest(Draw):
        def uniform(self, nth: int) -> float:
            return float(np.nextafter(1, 0))

    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for options in ({}, {"top_p": 0.9}, {"top_k": 3}):
        assert choose_tokens(logits, [Largest(Sampling(temperature=1.0, **options))], [0]).item() in {1, 2}


def test_half_precision_logits_are_drawn_from_in_full() -> None:
    flat = torch.zeros(4096, dtype=torch.bfloat16)
    assert (frequencies(Sampling(temperature=1.0), flat) > 0).mean() > 0.9


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}])
def test_a_seed_gives_the_same_answer_alone_in_a_batch_warm_and_after_preemption(options: dict[str, Any]) -> None:
    pytest.importorskip("transformers", reason="needs the extra chat")
    prompts, samplings = [prompt(i, 20) for i in range(4)], [Sampling(1.5, seed=i, **options) for i in range(4)]
    alone = []
    for ids, sampling in zip(prompts, samplings, strict=True):
        alone += engine_for().generate([ids], max_new_tokens=20, sampling=sampling, stop_tokens=())
    for num_pages in (256, 10):
        engine = engine_for(num_pages=num_pages)
        for _ in range(2):
            pairs = zip(prompts, samplings, strict=True)
            requests = [engine.submit(ids, max_new_tokens=20, sampling=s, stop_tokens=()) for ids, s in pairs]
            engine.wait(requests)
            assert [each.tokens for each in requests] == [each.tokens for each in alone]
        preemptions = sum(each.num_preemptions for each in requests)
        assert (preemptions > 0) == (num_pages == 10)


def test_a_row_draws_the_same_beside_rows_of_other_options() -> None:
    several: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.9}, {"temperature": 0.0}]
    draws = [Draw(Sampling(**({"temperature": 1.3, "seed": i} | options))) for i, options in enumerate(several * 20)]
    logits = torch.randn(len(draws), 64, generator=torch.Generator().manual_seed(0))
    together = choose_tokens(logits, draws, range(len(draws))).tolist()
    alone = [
        choose_tokens(row[None], [draw], [i]).item() for i, (row, draw) in enumerate(zip(logits, draws, strict=True))
    ]
    assert together == alone


def test_two_seeds_give_two_answers() -> None:
    pytest.importorskip("transformers", reason="needs the extra chat")
    engine = engine_for()
    answers = [
        engine.generate([prompt(1, 9)], max_new_tokens=12, sampling=Sampling(1.0, seed=seed))[0] for seed in (1, 2)
    ]
    assert answers[0].tokens != answers[1].tokens


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": -1.0}, "temperature must be a number of at least 0, not -1.0"),
        ({"temperature": float("nan")}, "not nan"),
        ({"temperature": "hot"}, "not 'hot'"),
        ({"temperature": True}, "not True"),
        ({"temperature": np.bool_(True)}, "not .*True"),
        ({"temperature": 1j}, "not 1j"),
        ({"temperature": np.float32("nan")}, "not .*nan"),
        ({"temperature": np.float32("inf")}, "not .*inf"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"top_k": 0}, "top_k must be an integer of at least 1"),
        ({"top_k": 1.5}, "not 1.5"),
        ({"top_k": True}, "not True"),
        ({"top_k": np.float32(2.0)}, "not .*2.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.1}, "not 1.1"),
        ({"top_p": True}, "not True"),
        ({"top_p": "0.9"}, "not '0.9'"),
        ({"top_p": np.complex64(0.5)}, "top_p must be in"),
        ({"seed": -1}, "seed must be an integer of at least 0, not -1"),
        ({"seed": False}, "not False"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadValueError, match=problem):
        Sampling(**options)


@pytest.mark.parametrize(
    ("real", "integer"),
    [(np.float16, np.int8), (np.float32, np.uint8), (np.float64, np.int64), (np.longdouble, np.uint64)],
)
def test_numbers_of_numpy_mean_the_same_as_pythons(real: Any, integer: Any) -> None:  # noqa: ANN401  types of numpy
    sampling = Sampling(real(0.75), integer(3), real(0.5), integer(7))
    plain = Sampling(0.75, 3, 0.5, 7)
    assert repr(sampling) == repr(plain)
    answers = [
        engine_for().generate([prompt(1, 9)], max_new_tokens=most, sampling=each)[0].tokens
        for each, most in ((sampling, integer(6)), (plain, 6))
    ]
    assert answers[0] == answers[1]


def test_a_fraction_is_a_temperature_and_more_tokens_than_there_are_are_all() -> None:
    assert Sampling(Fraction(3, 4)).temperature == 0.75  # type: ignore[arg-type]
    assert frequencies(Sampling(1.0, top_k=10**400)).tolist() == frequencies(Sampling(1.0, top_k=5)).tolist()
