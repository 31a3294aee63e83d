"""The engine on the GPU, with flashinfer: what a model computes without a cache, up to bfloat16; and no page lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from radix import PrefixCache
from radix.integrations.transformers import Engine, Sampling, manager_for
from radix.integrations.transformers.decoding import Decoder, GraphSizes
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
    graph_sizes: GraphSizes = None,
    run_ahead: bool | None = None,
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
        run_ahead=run_ahead,
    )


def num_replays(decoder: Decoder | None) -> int:
    """Steps of graphs, of either kind."""
    assert decoder is not None
    return sum(graphs.num_replays for graphs in (decoder.whole, decoder.layers) if graphs is not None)


def expect_logits_of(
    alone: Any,  # noqa: ANN401  of transformers
    served: Any,  # noqa: ANN401  likewise
    packing: Packing,
    graph_sizes: GraphSizes,
) -> Decoder | None:
    """Twelve requests on one prefix, one of whose steps is compared; returns what computed it."""
    system = prompt(1, 700)
    prompts = [system + prompt(2 + i, 10 + 7 * i) for i in range(12)]
    with engine_of(served, 400, packing, graph_sizes=graph_sizes, run_ahead=False) as engine:
        assert engine.runner.attention.backend == "flashinfer"
        engine.generate([system], max_new_tokens=1)
        most = 100 if graph_sizes == "auto" else 40  # it waits for a form to come again before it captures it
        requests = [engine.submit(ids, max_new_tokens=most, stop_tokens=()) for ids in prompts]
        seen: list[torch.Tensor] = []
        while not all(len(request.tokens) > most - 10 for request in requests):
            engine.step()
        forward = engine.runner.forward
        engine.runner.forward = lambda step: seen.append(forward(step).float()) or seen[-1]  # type: ignore[func-returns-value,method-assign]
        before = [len(request.tokens) for request in requests]
        decoder = engine.runner.decoder
        num_before = num_replays(decoder) if graph_sizes is not None else 0
        engine.step()
        assert graph_sizes is None or num_replays(decoder) > num_before
        engine.wait(requests)
        engine.cache.check()
    for row, request, num in zip(seen[0], requests, before, strict=True):
        ids = torch.tensor([request.prompt.tolist() + request.tokens[:num]], device="cuda:0")
        with torch.no_grad():
            want = alone(ids).logits[0, -1].float()
        assert float((row - want).norm() / want.norm()) < 2e-2
    return decoder


@pytest.mark.parametrize("packing", ["plain", "hybrid"])
@pytest.mark.parametrize("graph_sizes", [None, (), (4, 16), "auto"], ids=str)
def test_logits_are_those_without_a_cache_up_to_bfloat16(
    models: tuple[Any, Any], packing: Packing, graph_sizes: GraphSizes
) -> None:
    served, alone = models
    decoder = expect_logits_of(alone, served, packing, graph_sizes)
    assert decoder is None or (decoder.whole is not None) == (graph_sizes != ())


@pytest.mark.parametrize("looks", [lambda rows: rows.sum().item(), lambda _: torch.cuda.synchronize()])
def test_a_model_that_cannot_be_captured_goes_on_without(
    models: tuple[Any, Any], looks: Callable[[torch.Tensor], object], caplog: pytest.LogCaptureFixture
) -> None:
    served, alone = models

    def hook(_: object, __: object, rows: torch.Tensor) -> torch.Tensor:
        looks(rows)
        return rows

    with caplog.at_level("WARNING", logger="radix"):
        handle = served.model.norm.register_forward_hook(hook)
        try:
            decoder = expect_logits_of(alone, served, "hybrid", "auto")
        finally:
            handle.remove()
    assert decoder is not None
    assert decoder.whole is None
    assert len(caplog.records) == 1
    assert "LlamaForCausalLM decodes without a graph" in caplog.text
    assert torch.randn(8, device="cuda").isfinite().all(), "random numbers are drawn as before"
    decoder = expect_logits_of(alone, served, "hybrid", "auto")
    assert decoder is not None
    assert decoder.whole is not None, "another engine captures"


def test_a_mixture_of_experts_is_served() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra chat")
    config = transformers.MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        num_local_experts=4,
        sliding_window=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    served, alone = (transformers.MixtralForCausalLM(config).to("cuda:0", torch.bfloat16).eval() for _ in range(2))
    alone.load_state_dict(served.state_dict())
    for packing in ("plain", "hybrid"):
        decoder = expect_logits_of(alone, served, packing, "auto")
        assert decoder is not None
        print(packing, "one graph" if decoder.whole is not None else "graphs of its attention")


@pytest.mark.parametrize("graph_sizes", [None, (), (1, 2, 4, 8), "auto"], ids=str)
def test_nothing_is_lost_where_pages_are_short(models: tuple[Any, Any], graph_sizes: GraphSizes) -> None:
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


@pytest.mark.parametrize("packing", ["plain", "hybrid"])
@pytest.mark.parametrize("graph_sizes", [None, (), (16,), "auto"], ids=str)
def test_steps_that_are_launched_ahead_choose_the_same_tokens(
    models: tuple[Any, Any], packing: Packing, graph_sizes: GraphSizes
) -> None:
    """All requests of one length: batches are the same, and so is every bit."""
    served, _ = models
    prompts = [prompt(1, 700) + prompt(2 + i, 20) for i in range(12)]
    answers = []
    for run_ahead in (True, False):
        with engine_of(served, 400, packing, graph_sizes=graph_sizes, run_ahead=run_ahead) as engine:
            engine.generate([prompt(1, 700)], max_new_tokens=1)
            samplings = [Sampling(1.0, top_p=0.9, seed=i) if i % 3 == 0 else Sampling() for i in range(12)]
            requests = [
                engine.submit(ids, max_new_tokens=80, sampling=sampling, stop_tokens=())
                for ids, sampling in zip(prompts, samplings, strict=True)
            ]
            engine.wait(requests)
            assert (engine.steps.num_ahead > 60) == run_ahead
            engine.cache.check()
        answers.append([request.tokens for request in requests])
    same = [one == other for one, other in zip(*answers, strict=True)]
    assert all(same), same


def test_short_prompts_are_rows_of_a_graph(models: tuple[Any, Any]) -> None:
    """Messages that join others, round by round; the logits of each one's last token against the model alone."""
    served, alone = models
    system, num_in_graphs = prompt(1, 700), 0
    found: list[tuple[list[int], torch.Tensor]] = []
    with engine_of(served, 400, graph_sizes=(16, 64, 128), run_ahead=False) as engine:
        engine.generate([system], max_new_tokens=1)
        assert engine.runner.decoder is not None
        whole = engine.runner.decoder.whole
        assert whole is not None
        forward, seen = engine.runner.forward, []
        engine.runner.forward = lambda step: seen.append(forward(step).float()) or seen[-1]  # type: ignore[func-returns-value,method-assign]
        for number in range(7):
            ids = [system + prompt(100 + 2 * number + i, 12 + 17 * i) for i in range(2)]
            requests = [engine.submit(each, max_new_tokens=40, stop_tokens=()) for each in ids]
            before = whole.num_replays
            assert engine.step()[-2:] == requests
            num_in_graphs += whole.num_replays - before
            found += zip(ids, seen[-1][-2:].clone(), strict=True)
            engine.step()
            engine.step()
        engine.cache.check()
        for request in list(engine.scheduler.running):
            engine.wait([request])
    assert num_in_graphs >= 3
    for each, row in found:
        with torch.no_grad():
            want = alone(torch.tensor([each], device="cuda:0")).logits[0, -1].float()
        assert float((row - want).norm() / want.norm()) < 2e-2


def test_a_seed_means_the_same_twice(models: tuple[Any, Any]) -> None:
    served, _ = models
    answers = []
    for _ in range(2):
        with engine_of(served, 64) as engine:
            options = {"sampling": Sampling(1.0, top_p=0.9, seed=3), "max_new_tokens": 20}
            answers.append(engine.generate([prompt(1, 50)], stop_tokens=(), **options)[0].tokens)  # type: ignore[arg-type]
    assert answers[0] == answers[1]
