"""Random lives of an engine in a cache too small for it: every answer is right, and nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from radix.integrations.transformers import Engine, Request, Sampling, flight
from radix.integrations.transformers.attention import Step
from radix.integrations.transformers.decoding import GraphStep
from seqattn import FlashInferHybridData
from seqattn.attention.graphs import DecodeGraphs
from tests.integrations.models import check_all_free, engine_for, generated, prompt
from tests.seqattn.packs import Asked, Packs, count_forests, reuse_whatever_changes

pytest.importorskip("transformers", reason="needs the extra chat")

MOST_NEW = 12
SYSTEM = prompt(1, 13)
POOL = [SYSTEM + prompt(i, 1 + i * 2) for i in range(6)] + [prompt(20 + i, 3 + 5 * i) for i in range(4)]


def expect_right(request: Request) -> None:
    """A finished request has the tokens of the truth, a cancelled one the first of them."""
    want = generated("Llama", request.prompt.tolist(), MOST_NEW)
    have = len(request.tokens) if request.finish_reason == "cancelled" else request.max_new_tokens
    assert request.tokens == want[:have], f"{request.id} {request.finish_reason}"


def step_that_fails(engine: Engine, *, is_late: bool, at: int) -> None:
    """A step whose nth forward ends in an error, after it has computed all; or whose tokens cannot be read."""
    forward, num_failed, num_calls = engine.runner.forward, 0, 0

    def fails(step: Step | GraphStep) -> torch.Tensor:
        nonlocal num_failed, num_calls
        logits, num_calls = forward(step), num_calls + 1
        if num_calls < at:
            return logits
        num_failed += 1
        raise RuntimeError("out of memory")

    def is_lost(_: object) -> list[int]:
        nonlocal num_failed
        num_failed += 1
        raise RuntimeError("the device is lost")

    with pytest.MonkeyPatch.context() as patch:
        if is_late:
            patch.setattr(flight._Flight, "read", is_lost)
        else:
            patch.setattr(engine.runner, "forward", fails)
        with suppress(RuntimeError):
            engine.step()
            assert not num_failed, "what the model raises is the caller's"


def check_packing(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """From now on, proves each hybrid batch, and compares it with one that is packed anew."""
    packs = Packs(engine.cache.descriptor, engine.cache.pack_hybrid_for_flashinfer)

    def checked(ids: list[Hashable], **options: Any) -> FlashInferHybridData:  # noqa: ANN401  as of the cache
        return packs.pack(ids, Asked(options["query_lens"], options["num_tokens"], options["cost_model"]))

    patch.setattr(engine.cache, "pack_hybrid_for_flashinfer", checked)


@pytest.mark.parametrize(
    ("run_ahead", "as_rows"), [(False, False), (True, False), (True, True)], ids=["", "ahead", "ahead, prompts as rows"]
)
@pytest.mark.parametrize("seed", range(6))
def test_every_answer_of_a_random_life_is_right_and_no_page_is_lost(
    seed: int, run_ahead: bool, as_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(seed)
    graph_sizes: tuple[int, ...]
    budget, graph_sizes = int(random.integers(5, 24)), (4,) if seed % 2 else ()
    if as_rows:
        graph_sizes = (2, 16)
        monkeypatch.setattr(DecodeGraphs, "captures", True)
        monkeypatch.setattr(DecodeGraphs, "replay_if_captured", DecodeGraphs.replay)
    options: dict[str, Any] = {"max_tokens_per_step": budget, "graph_sizes": graph_sizes, "run_ahead": run_ahead}
    engine = engine_for(num_pages=14, page_size=4, max_requests=5, **options)
    check_packing(engine, monkeypatch)
    reuse_whatever_changes(monkeypatch)
    made = count_forests(monkeypatch)
    requests: list[Request] = []
    for _ in range(120):
        open_ones = [request for request in requests if not request.is_finished]
        action = random.choice(
            ["submit", "step", "cancel", "fork", "evict", "fail"], p=[0.25, 0.5, 0.05, 0.1, 0.05, 0.05]
        )
        if action == "submit" and len(open_ones) < 12:
            ids, tenant = POOL[random.integers(len(POOL))], [None, "a"][random.integers(2)]
            requests.append(engine.submit(ids, max_new_tokens=int(random.integers(1, MOST_NEW)), namespace=tenant))
        elif action == "cancel" and open_ones:
            engine.cancel(open_ones[random.integers(len(open_ones))])
        elif action == "fork" and open_ones:
            requests.append(engine.fork(open_ones[random.integers(len(open_ones))], sampling=Sampling()))
        elif action == "evict":
            engine.cache.evict(3)
        elif action == "fail":
            step_that_fails(engine, is_late=bool(random.integers(2)), at=int(random.integers(1, 3)))
        else:
            engine.step()
        engine.cache.check()
    engine.wait(requests)
    for request in requests:
        expect_right(request)
    assert engine.cache.stats.num_evicted_pages > 0
    assert (engine.steps.num_ahead > 10) == run_ahead
    assert made["changed"] > 0
    check_all_free(engine)
