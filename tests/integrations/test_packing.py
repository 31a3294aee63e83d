"""Shared levels are given out again while only tails grow, and packed anew when anything else may have changed."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from radix.integrations.transformers import Engine, Sampling
from radix.integrations.transformers.scheduler import Growth
from seqattn import FlashInferHybridData
from tests.integrations.models import engine_for, generated, prompt

pytest.importorskip("transformers", reason="needs the extra chat")

SHARED = prompt(1, 24)


def decoding(num_requests: int, max_new_tokens: int = 100) -> Engine:
    """An engine whose requests share a prefix and have their first token; nothing that decodes is packed yet."""
    engine = engine_for()
    engine.generate([SHARED], max_new_tokens=1)
    for i in range(num_requests):
        engine.submit([*SHARED, 2 + i], max_new_tokens=max_new_tokens, stop_tokens=())
    engine.step()
    packer = engine.runner.packer
    assert (packer.num_full, packer.num_grown) == (0, 0)
    return engine


def test_a_decoding_batch_is_packed_in_full_once_in_64_steps() -> None:
    engine = decoding(3)
    packer = engine.runner.packer
    for _ in range(65):
        engine.step()
    assert (packer.num_full, packer.num_grown) == (1, 64)
    engine.step()
    assert (packer.num_full, packer.num_grown) == (2, 64)


def test_shared_levels_stay_the_same_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = decoding(3)
    packer, batches = engine.runner.packer, []
    pack = packer.pack

    def noted(ids: list[Hashable], growth: Growth | None) -> FlashInferHybridData:
        batches.append(pack(ids, growth))
        return batches[-1]

    monkeypatch.setattr(packer, "pack", noted)
    for _ in range(12):
        engine.step()
    for data in batches:
        data.check(8)
        assert len(data.levels) == 2
        assert data.levels[0] is batches[0].levels[0]
        assert data.order is batches[0].order
    num_pages = [len(data.levels[1].kv_page_indices) for data in batches]
    assert num_pages[0] < num_pages[-1], "pages were added meanwhile"


@pytest.mark.parametrize("change", ["join", "leave", "fork", "publish"])
def test_any_other_change_packs_in_full(change: str) -> None:
    engine = decoding(3)
    packer = engine.runner.packer
    for _ in range(3):
        engine.step()
    assert packer.num_full == 1
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
    assert packer.num_full == 2
    for request in engine.wait(list(engine.scheduler.running)):
        assert request.tokens == generated("Llama", request.prompt.tolist(), 100)[: len(request.tokens)]


def test_one_request_or_none_that_share_are_packed_plain() -> None:
    engine = engine_for(packing="plain")
    engine.generate([[*SHARED, i] for i in range(2, 5)], max_new_tokens=8)
    alone = engine_for()
    alone.generate([SHARED], max_new_tokens=8)
    for each in (engine, alone):
        assert (each.runner.packer.num_full, each.runner.packer.num_grown) == (0, 0)
