"""Short prompts as rows of a decode step: what a graph computes on CUDA, here computed without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from radix import PrefixCache
from radix.integrations.transformers import Engine, Request, Sampling
from radix.integrations.transformers.decoding import Decoder
from radix.integrations.transformers.packing import pack_rows
from radix.integrations.transformers.scheduler import Batch
from seqattn import CostModel, PageAllocator
from seqattn.attention.graphs import DecodeGraphs
from seqattn.errors import CaptureError
from seqattn.hybrid import check_hybrid
from tests.integrations.models import KINDS, check_all_free, engine_for, generated, prompt

pytest.importorskip("transformers", reason="needs the extra chat")

MOST_ROWS = 32
SYSTEM = prompt(1, 45)


@pytest.fixture(autouse=True)
def _without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step for which there could be a graph is computed as if there were."""
    monkeypatch.setattr(DecodeGraphs, "captures", True)
    monkeypatch.setattr(DecodeGraphs, "replay_if_captured", DecodeGraphs.replay)


def engine_of(kind: str = "Llama", **options: Any) -> Engine:  # noqa: ANN401  of the engine
    return engine_for(kind, graph_sizes=(4, MOST_ROWS), **options)


def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step with prompts that was computed so."""
    rows: list[int] = []
    decoder = engine.runner.decoder
    assert decoder is not None
    forward = decoder.forward_prompts
    monkeypatch.setattr(decoder, "forward_prompts", lambda step: rows.append(len(step.tokens)) or forward(step))  # type: ignore[func-returns-value]
    return rows


def expect(*requests: Request) -> None:
    for request in requests:
        assert request.tokens == generated("Llama", request.prompt.tolist(), request.max_new_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_generate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(kind)
    rows = watched(engine, monkeypatch)
    prompts = [SYSTEM + prompt(2 + i, 1 + 3 * i) for i in range(5)]
    for ids in prompts:
        (request,) = engine.generate([ids], max_new_tokens=8)
        assert request.tokens == generated(kind, ids, 8)
    assert rows == [4, 7, 10, 13], "the first is too long"
    check_all_free(engine)


def test_prompts_join_those_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    rows = watched(engine, monkeypatch)
    requests = [engine.submit(SYSTEM + prompt(9, 2), max_new_tokens=20)]
    for i in range(4):
        engine.step()
        engine.step()
        requests.append(engine.submit(SYSTEM + prompt(20 + i, 4 + i), max_new_tokens=12))
    engine.wait(requests)
    expect(*requests)
    assert len(rows) == 4
    assert rows[0] == 1 + 5 + 4, "one decodes; five tokens stand in a page that is not published yet"
    check_all_free(engine)


def test_a_prompt_in_chunks_is_cut_at_any_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for budget in (5, 7, 8, 16, 31):
        engine = engine_of(max_requests=4, max_tokens_per_step=budget)
        rows = watched(engine, monkeypatch)
        requests = [engine.submit(prompt(i, 20 + 9 * i), max_new_tokens=6) for i in range(4)]
        engine.wait(requests)
        expect(*requests)
        assert max(rows) == budget
        check_all_free(engine)


def test_forks_of_a_prompt_begin_with_its_last_row() -> None:
    engine = engine_of()
    engine.generate([SYSTEM], max_new_tokens=1)
    first = engine.submit(SYSTEM + prompt(3, 6), max_new_tokens=9)
    forks = [engine.fork(first, sampling=Sampling()) for _ in range(3)]
    other = engine.submit(SYSTEM + prompt(4, 2), max_new_tokens=9)
    engine.wait([first, *forks, other])
    expect(first, *forks, other)
    check_all_free(engine)


def test_plain_packing_and_steps_with_more_rows_are_computed_as_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"packing": "plain"}, {"max_tokens_per_step": 64}):
        engine = engine_of(**options)
        rows = watched(engine, monkeypatch)
        ids = prompt(5, MOST_ROWS + 1)
        assert engine.generate([ids], max_new_tokens=4)[0].tokens == generated("Llama", ids, 4)
        assert not rows


def test_without_a_graph_for_it_a_prompt_is_computed_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeGraphs, "replay_if_captured", lambda *_: None)
    engine = engine_of()
    requests = [engine.submit(SYSTEM[:20] + prompt(5 + i, 3), max_new_tokens=6) for i in range(3)]
    engine.wait(requests)
    expect(*requests)
    check_all_free(engine)


def test_without_graphs_no_prompt_is_packed_by_rows() -> None:
    assert Decoder(None, None, None).most_rows == 0
    decoder = engine_of().runner.decoder
    assert decoder is not None
    assert decoder.most_rows == MOST_ROWS


@pytest.mark.parametrize("cost_model", [None, CostModel(), "auto"], ids=["every run", "by costs", "by a device"])
@pytest.mark.parametrize("seed", range(8))
def test_rows_are_packed_as_sequences_that_end_with_them(seed: int, cost_model: Any) -> None:  # noqa: ANN401  one of three
    """Each row's pages, in order, are those of the tokens up to it; a page that is written is shared by nobody."""
    random = np.random.default_rng(seed)
    page_size = int(random.choice([1, 4, 16]))
    cache = PrefixCache(PageAllocator(4000, page_size))
    cache.start("system", SYSTEM * 4)
    cache.finish("system")
    ids, num_done, num_new = list(range(6)), [], []
    for i in ids:
        tokens = SYSTEM * (i % 3) + prompt(i, int(random.integers(1, 50)))
        begin = cache.start(i, tokens).num_cached_tokens
        num_done.append(int(random.integers(begin, len(tokens))))
        num_new.append(int(random.integers(1, len(tokens) - num_done[-1] + 1)))
    model = CostModel.for_heads(32, 8, 128, 2) if cost_model == "auto" else cost_model
    data = pack_rows(cache, ids, num_done, num_new, model)
    row_lens = [n for done, new in zip(num_done, num_new, strict=True) for n in range(done + 1, done + new + 1)]
    whose = np.repeat(ids, num_new)
    tables, _ = cache.descriptor.tables(ids)
    row_tables = [tables[i][: -(-n // page_size)] for i, n in zip(whose, row_lens, strict=True)]
    check_hybrid(data, row_tables, row_lens, None, page_size, cost_model=model or CostModel())
    assert data.num_sequences == sum(num_new)
    written = {int(tables[i][(n - 1) // page_size]) for i, n in zip(whose, row_lens, strict=True)}
    for level in data.levels[:-1]:
        assert written.isdisjoint(level.kv_page_indices.tolist())
    if cost_model is None and page_size < 16:
        assert len(data.levels) > 1


def test_a_batch_of_rows_is_what_the_scheduler_made(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    seen: list[Batch] = []
    prepare = engine.runner._prepare_as_rows
    monkeypatch.setattr(engine.runner, "_prepare_as_rows", lambda batch: seen.append(batch) or prepare(batch))  # type: ignore[func-returns-value]
    request = engine.submit(prompt(1, 12), max_new_tokens=3)
    engine.wait([request])
    assert [(batch.num_new, batch.num_decoding) for batch in seen] == [([12], 0)]
    expect(request)


def test_prompts_go_on_without_graphs_after_a_capture_that_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:  # noqa: ANN401  whatever `replay_if_captured` takes
        raise CaptureError("LlamaForCausalLM", "OutOfMemoryError: no memory")

    monkeypatch.setattr(DecodeGraphs, "replay_if_captured", fails)
    engine = engine_of()
    with caplog.at_level("WARNING", logger="radix"):
        requests = [engine.generate([prompt(5 + i, 9)], max_new_tokens=6)[0] for i in range(3)]
    expect(*requests)
    assert len(caplog.records) == 1
    assert "prompts are computed without graphs from now on" in caplog.text
    assert engine.runner.decoder is not None
    assert engine.runner.decoder.most_rows == 0
    check_all_free(engine)
