"""Tiny models with random weights, and the slow truth about them: one sequence at a time, without a cache of ours."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

from radix import PrefixCache
from radix.integrations.transformers import Engine, manager_for

#: of transformers, or an option of any type
Untyped: TypeAlias = Any

VOCAB_SIZE = 160
END = 1
KINDS = ["Llama", "Qwen2", "Qwen3", "Mistral", "GPTNeoX", "Phi"]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "GPTNeoX": {"rotary_pct": 0.25},
    "Phi": {"num_key_value_heads": 4},
}


def make(kind: str, **changes: Untyped) -> Untyped:
    """A model in eval mode whose answers are lively: random weights, three times as large as usual."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**_COMMON | _OWN.get(kind, {}) | changes)
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@cache
def truth(kind: str) -> Untyped:
    """The same model, never served."""
    return make(kind)


@cache
def _generated(kind: str, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
    with torch.no_grad():
        out = truth(kind).generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False)
    return tuple(out[0, len(prompt) :].tolist())


def generated(kind: str, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What `model.generate` answers greedily, the end token included."""
    return list(_generated(kind, tuple(prompt), max_new_tokens))


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Random token ids that end nothing."""
    ids: list[int] = np.random.default_rng(seed).integers(2, VOCAB_SIZE, num_tokens).tolist()
    return ids


def engine_for(kind: str = "Llama", *, num_pages: int = 256, page_size: int = 8, **options: Untyped) -> Engine:
    """An engine without a tokenizer over a new model and cache."""
    model = copy.deepcopy(truth(kind))
    return Engine(model, None, PrefixCache(manager_for(model, num_pages=num_pages, page_size=page_size)), **options)


def cancel_again_and_again(engine: Engine, listen: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a task that listens to an answer, and cancels it once its request runs, until it has ended."""

    async def interrupt() -> None:
        # Its one thread is mostly in a step: what is to end the request has to wait for it.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        task = asyncio.create_task(listen())
        while not engine.num_running:
            await asyncio.sleep(0.001)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled()

    asyncio.run(interrupt())


def check_all_free(engine: Engine) -> None:
    """Nothing runs, the state is sound, and evicting everything frees every page."""
    assert not engine.num_running
    assert not engine.num_waiting
    engine.cache.check()
    engine.cache.evict(engine.cache.manager.num_pages)
    assert engine.cache.manager.available_pages_count == engine.cache.manager.num_pages
