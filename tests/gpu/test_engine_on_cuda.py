"""The engine on the GPU, with flashinfer: what a model computes without a cache, up to bfloat16; and no page lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from radix import PrefixCache
from radix.integrations.transformers import Engine, Sampling, manager_for
from radix.integrations.transformers.runner import Packing

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

VOCAB_SIZE = 512


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A Llama with heads that the kernels read, in bfloat16; to be served, and to be asked by itself."""
    transformers = pytest.importorskip("transformers", reason="needs the extra chat")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    served, alone = (transformers.LlamaForCausalLM(config).to("cuda:0", torch.bfloat16).eval() for _ in range(2))
    alone.load_state_dict(served.state_dict())
    return served, alone


def prompt(seed: int, num_tokens: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, VOCAB_SIZE, num_tokens).tolist()
    return ids


def engine_of(
    model: Any,  # noqa: ANN401  of transformers
    num_pages: int,
    packing: Packing = "hybrid",
    max_requests: int = 16,
    graph_sizes: tuple[int, ...] = (),
) -> Engine:
    cache = PrefixCache(manager_for(model, num_pages=num_pages))
    return Engine(
        model,
        None,
        cache,
        max_requests=max_requests,
        max_tokens_per_step=300,
        packing=packing,
        graph_sizes=graph_sizes,
    )


@pytest.mark.parametrize("packing", ["plain", "hybrid"])
@pytest.mark.parametrize("graph_sizes", [(), (4, 16)])
def test_logits_are_those_without_a_cache_up_to_bfloat16(
    models: tuple[Any, Any], packing: Packing, graph_sizes: tuple[int, ...]
) -> None:
    served, alone = models
    system = prompt(1, 700)
    prompts = [system + prompt(2 + i, 10 + 7 * i) for i in range(12)]
    with engine_of(served, 400, packing, graph_sizes=graph_sizes) as engine:
        assert engine.runner.attention.backend == "flashinfer"
        engine.generate([system], max_new_tokens=1)
        requests = [engine.submit(ids, max_new_tokens=9, stop_tokens=()) for ids in prompts]
        seen: list[torch.Tensor] = []
        while not all(len(request.tokens) > 4 for request in requests):
            engine.step()
        forward = engine.runner.forward
        engine.runner.forward = lambda step: seen.append(forward(step).float()) or seen[-1]  # type: ignore[func-returns-value,method-assign]
        before = [len(request.tokens) for request in requests]
        engine.step()
        assert engine.runner.graphs is None or engine.runner.graphs.num_replays > 0
        engine.wait(requests)
        engine.cache.check()
    for row, request, num in zip(seen[0], requests, before, strict=True):
        ids = torch.tensor([request.prompt.tolist() + request.tokens[:num]], device="cuda:0")
        with torch.no_grad():
            want = alone(ids).logits[0, -1].float()
        assert float((row - want).norm() / want.norm()) < 2e-2


@pytest.mark.parametrize("graph_sizes", [(), (1, 2, 4, 8)])
def test_nothing_is_lost_where_pages_are_short(models: tuple[Any, Any], graph_sizes: tuple[int, ...]) -> None:
    served, _ = models
    with engine_of(served, 64, max_requests=8, graph_sizes=graph_sizes) as engine:
        requests = [engine.submit(prompt(i, 60 + 11 * i), max_new_tokens=60, stop_tokens=()) for i in range(20)]
        forks = [engine.fork(request, sampling=Sampling(1.0, seed=i)) for i, request in enumerate(requests[::5])]
        engine.wait([*requests, *forks])
        assert all(len(request.tokens) == 60 for request in (*requests, *forks))
        assert sum(request.num_preemptions for request in requests) > 0
        engine.cache.check()
        engine.cache.evict(64)
        assert engine.cache.manager.available_pages_count == 64


def test_a_seed_means_the_same_twice(models: tuple[Any, Any]) -> None:
    served, _ = models
    answers = []
    for _ in range(2):
        with engine_of(served, 64) as engine:
            options = {"sampling": Sampling(1.0, top_p=0.9, seed=3), "max_new_tokens": 20}
            answers.append(engine.generate([prompt(1, 50)], stop_tokens=(), **options)[0].tokens)  # type: ignore[arg-type]
    assert answers[0] == answers[1]
