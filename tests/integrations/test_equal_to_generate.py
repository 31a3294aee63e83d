"""Greedy answers are those of `model.generate`, token for token, whatever is cached, shared, evicted or beside them."""

from __future__ import annotations

import pytest
import torch

from radix.integrations.transformers import Engine, Sampling
from tests.integrations.models import (
    END,
    KINDS,
    Untyped,
    check_all_free,
    engine_for,
    generated,
    prompt,
    truth,
)

pytest.importorskip("transformers", reason="needs the extra chat")

NUM_NEW = 16
LENS = (1, 5, 8, 40, 17, 100)
PROMPTS = [prompt(i, num_tokens) for i, num_tokens in enumerate(LENS)]


def expect_equal(engine: Engine, kind: str, prompts: list[list[int]]) -> None:
    """Submits prompts as one batch and compares each answer."""
    answers = engine.generate(prompts, max_new_tokens=NUM_NEW)
    assert [answer.tokens for answer in answers] == [generated(kind, ids, NUM_NEW) for ids in prompts]
    engine.cache.check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_lively_enough_to_tell_right_from_wrong(kind: str) -> None:
    answers = [generated(kind, ids, NUM_NEW) for ids in PROMPTS]
    assert len({token for answer in answers for token in answer}) > 20
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_equal_with_a_cold_cache_and_a_warm_one(kind: str) -> None:
    engine = engine_for(kind)
    expect_equal(engine, kind, PROMPTS)
    for ids in PROMPTS:  # all but the last token of each prompt is there now, whatever the page size
        assert engine.cache.match(ids).num_tokens == len(ids)
    expect_equal(engine, kind, PROMPTS)
    check_all_free(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_equal_under_eviction_and_preemption(kind: str) -> None:
    engine = engine_for(kind, num_pages=15)  # the longest needs all of them
    prompts = PROMPTS + [prompt(100 + i, 30) for i in range(6)]
    expect_equal(engine, kind, prompts)
    assert engine.cache.stats.num_evicted_pages > 0
    check_all_free(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_equal_for_a_batch_that_shares_prefixes_at_several_depths(kind: str) -> None:
    system, document = prompt(1, 45), prompt(2, 30)
    prompts = [system + prompt(i, 3 + i) for i in range(3)]
    prompts += [system + document + prompt(10 + i, 2 + 3 * i) for i in range(3)]
    engine = engine_for(kind)
    expect_equal(engine, kind, [system])
    expect_equal(engine, kind, prompts)
    check_all_free(engine)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_answers_are_equal_at_any_page_size_in_chunks_of_any_length(kind: str, page_size: int) -> None:
    engine = engine_for(kind, page_size=page_size, num_pages=1024 // page_size, max_requests=6, max_tokens_per_step=7)
    expect_equal(engine, kind, PROMPTS)
    check_all_free(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_equal_for_forks(kind: str) -> None:
    engine = engine_for(kind)
    request = engine.submit(PROMPTS[3], max_new_tokens=NUM_NEW)
    forks = [engine.fork(request, sampling=Sampling())]
    while len(request.tokens) < 5:
        engine.step()
    forks.append(engine.fork(request, sampling=Sampling()))
    engine.wait([request, *forks])
    for each in (request, *forks):
        assert each.tokens == generated(kind, PROMPTS[3], NUM_NEW)
    check_all_free(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_on_an_answer_computes_its_new_tokens_only(kind: str) -> None:
    engine = engine_for(kind)
    ids, turn = PROMPTS[4], prompt(77, 9)
    (first,) = engine.generate([ids], max_new_tokens=NUM_NEW)
    ids = ids + first.tokens + turn
    (second,) = engine.generate([ids], max_new_tokens=NUM_NEW)
    assert second.tokens == generated(kind, ids, NUM_NEW)
    assert second.num_computed_tokens == 1 + len(turn), "the last token of an answer has no KV yet"
    check_all_free(engine)


def collect_logits(engine: Engine) -> list[torch.Tensor]:
    """Logits of every forward from now on, [rows, vocabulary]."""
    seen: list[torch.Tensor] = []

    def note(module: object, arguments: object, output: Untyped) -> None:
        seen.append(output.logits[0])

    engine.model.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_within_1e_4_of_those_without_a_cache(kind: str) -> None:
    engine, ids = engine_for(kind), PROMPTS[5]
    engine.generate([ids[:70]], max_new_tokens=1)  # so that most of it is cached
    seen = collect_logits(engine)
    (answer,) = engine.generate([ids], max_new_tokens=NUM_NEW, stop_tokens=())
    with torch.no_grad():
        dense = truth(kind)(torch.tensor([ids + answer.tokens])).logits[0, len(ids) - 1 : -1]
    assert len(seen) == NUM_NEW
    torch.testing.assert_close(torch.cat(seen), dense, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_and_hybrid_packing_answer_alike(kind: str) -> None:
    prompts = [PROMPTS[5] + prompt(i, 4) for i in range(4)]
    for packing in ("plain", "hybrid"):
        engine = engine_for(kind, packing=packing)
        expect_equal(engine, kind, [PROMPTS[5]])
        expect_equal(engine, kind, prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_equal_where_decoding_goes_through_graphs(kind: str) -> None:
    for packing in ("plain", "hybrid"):
        engine = engine_for(kind, packing=packing, graph_sizes=(1, 8), num_pages=24)
        expect_equal(engine, kind, PROMPTS)
        assert engine.runner.decoder is not None
        assert engine.runner.decoder.whole is not None
        assert engine.runner.decoder.whole.num_eager > 0, "there is no graph on the CPU, but the same way"
        check_all_free(engine)


def test_an_answer_ends_with_the_end_token_as_that_of_generate_does() -> None:
    ended = [ids for i in range(60) if (ids := prompt(500 + i, 4)) and generated("Qwen3", ids, NUM_NEW)[-1] == END]
    assert ended, "no prompt ends early: draw more"
    engine = engine_for("Qwen3")
    for answer in engine.generate(ended, max_new_tokens=NUM_NEW):
        assert answer.tokens == generated("Qwen3", answer.prompt.tolist(), NUM_NEW)
        assert (answer.tokens[-1], answer.finish_reason) == (END, "stop")
