"""While an engine decodes, shared levels are given out again, and no forest is built."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest

from radix.integrations.transformers import Engine, Sampling
from seqattn import FlashInferHybridData
from tests.integrations.models import engine_for, generated, prompt
from tests.seqattn.packs import count_forests, reuse_whatever_changes

pytest.importorskip("transformers", reason="needs the extra chat")

SHARED = prompt(1, 24)


@pytest.fixture(autouse=True)
def reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    reuse_whatever_changes(monkeypatch)


def decoding(num_requests: int, max_new_tokens: int = 100) -> Engine:
    """An engine whose requests share a prefix and have their first token; nothing that decodes is packed yet."""
    engine = engine_for()
    engine.generate([SHARED], max_new_tokens=1)
    for i in range(num_requests):
        engine.submit([*SHARED, 2 + i], max_new_tokens=max_new_tokens, stop_tokens=())
    engine.step()
    return engine


def packed(engine: Engine, patch: pytest.MonkeyPatch) -> list[FlashInferHybridData]:
    """Every hybrid batch that is packed from now on."""
    pack, batches = engine.cache.pack_hybrid_for_flashinfer, list[FlashInferHybridData]()

    def noted(ids: list[Hashable], **options: Any) -> FlashInferHybridData:  # noqa: ANN401  as of the cache
        batches.append(pack(ids, **options))
        return batches[-1]

    patch.setattr(engine.cache, "pack_hybrid_for_flashinfer", noted)
    return batches


def test_shared_levels_stay_the_same_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = decoding(3)
    batches, made = packed(engine, monkeypatch), count_forests(monkeypatch)
    for _ in range(65):
        engine.step()
    for data in batches:
        data.check(8)
        assert len(data.levels) == 2
        assert data.levels[0] is batches[0].levels[0]
        assert data.order is batches[0].order
    num_pages = [len(data.levels[1].kv_page_indices) for data in batches]
    assert num_pages[0] < num_pages[-1], "pages were added meanwhile"
    assert len(batches) == 65
    assert made["built"] <= 1
    assert not made["changed"]


@pytest.mark.parametrize("change", ["join", "leave", "fork", "publish"])
def test_any_other_change_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = decoding(3)
    for _ in range(3):
        engine.step()
    batches, made = packed(engine, monkeypatch), count_forests(monkeypatch)
    first = engine.scheduler.running[0]
    if change == "join":
        engine.submit([*SHARED, 90], max_new_tokens=4, stop_tokens=())
        engine.step()  # computes a prompt, and is packed apart from those that only decode
    elif change == "leave":
        engine.cancel(first)
    elif change == "fork":
        engine.fork(first, sampling=Sampling())
    else:
        engine.cache.start("other", [*SHARED, 5, 6, 7])
        engine.cache.finish("other", num_tokens=24)
    engine.step()
    assert batches[-1].num_sequences == len(engine.scheduler.running)
    assert not made["built"]
    assert bool(made["changed"]) == (change != "publish"), "what another sequence does changes nothing"
    for request in engine.wait(list(engine.scheduler.running)):
        assert request.tokens == generated("Llama", request.prompt.tolist(), 100)[: len(request.tokens)]


def test_one_request_or_none_that_share_are_packed_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, alone = engine_for(packing="plain"), engine_for()
    batches = packed(engine, monkeypatch), packed(alone, monkeypatch)
    engine.generate([[*SHARED, i] for i in range(2, 5)], max_new_tokens=8)
    alone.generate([SHARED], max_new_tokens=8)
    assert batches == ([], [])
