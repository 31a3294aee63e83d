"""Chat on a CPU beside what one does without this library: a `DynamicCache` for each conversation.

    python -m benchmarks.chat_baseline [--out FILE] [--conversations 32] [--system 1000] [--batch 8] [--new 32]

SmolLM2-135M in float32; conversations share a system prompt and differ in a message. Three ways, in one run:

    engine      the pages of a prefix cache
    cache each  a DynamicCache for each conversation; its prompt is computed for it alone
    copies      likewise, but the system prompt's cache is kept and copied for each new conversation

Measures the bytes of keys and values that the conversations keep, the time to the first token of a new conversation
(the system prompt being known), and the tokens per second of a batch of them that decode side by side: for the two
others one forward for each conversation and token, and "padded batch" is one DynamicCache of the whole batch, which
the conversations then cannot keep one by one. Prints rows of JSON and writes them to the file.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.chat_models import llama, smollm2
from benchmarks.rows import machine
from radix import PrefixCache
from radix.integrations.transformers import Engine, Request, manager_for

MESSAGE, PAGE_SIZE, REPEATS = 24, 16, 5


class Conversations:
    """Prompts: a system prompt that all share, and a message each."""

    def __init__(self, vocab_size: int, system: int) -> None:
        self.random = np.random.default_rng(0)
        self.vocab_size = vocab_size
        self.system = self._tokens(system)

    def _tokens(self, num: int) -> list[int]:
        ids: list[int] = self.random.integers(3, self.vocab_size, num).tolist()
        return ids

    def prompts(self, num: int) -> list[list[int]]:
        """New conversations."""
        return [self.system + self._tokens(MESSAGE) for _ in range(num)]


class DynamicCaches:
    """What one does today: keep a cache for each conversation."""

    def __init__(self, model: Any, system: list[int] | None) -> None:  # noqa: ANN401  a model of transformers
        self.model = model
        #: what the library calls a cache: "cache" in new versions, which warn of the other name
        self.keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.kept = None
        self.num_kept = 0
        if system is not None:
            self.kept, self.num_kept = self._new(), len(system)
            self.forward(system, self.kept)

    def _new(self) -> Any:  # noqa: ANN401  a cache of transformers
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def forward(self, ids: list[int], cache: Any) -> int:  # noqa: ANN401  a cache of transformers
        """Computes tokens; the next one."""
        with torch.inference_mode():
            return int(self.logits(torch.tensor([ids]), cache)[0, -1].argmax())

    def logits(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:  # noqa: ANN401  a cache of transformers
        """Logits of the last tokens, [sequences, 1, vocabulary]."""
        output = self.model(input_ids=ids, logits_to_keep=1, **{self.keyword: cache})
        logits: torch.Tensor = output.logits
        return logits

    def begin(self, prompt: list[int]) -> tuple[Any, int]:
        """A new conversation: its cache, and its first token."""
        cache = copy.deepcopy(self.kept) if self.kept is not None else self._new()
        return cache, self.forward(prompt[self.num_kept :], cache)

    @staticmethod
    def num_bytes(cache: Any) -> int:  # noqa: ANN401  a cache of transformers
        """Keys and values of all layers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def first_tokens(engine: Engine, prompts: list[list[int]], num_new: int) -> list[Request]:
    """Requests that have just got their first token."""
    requests = [engine.submit(prompt, max_new_tokens=num_new, stop_tokens=()) for prompt in prompts]
    while not all(request.tokens for request in requests):
        engine.step()
    return requests


def with_engine(model: Any, work: Conversations, options: argparse.Namespace) -> dict[str, float]:  # noqa: ANN401
    """The measures of the engine."""
    pages_each = -(-(MESSAGE + options.new) // PAGE_SIZE) + 1
    num_pages = options.system // PAGE_SIZE + (options.conversations + options.batch + REPEATS) * pages_each + 1
    cache = PrefixCache(manager_for(model, num_pages=num_pages, page_size=PAGE_SIZE))
    manager = cache.manager
    page_bytes = sum(tensor.nbytes for tensor in manager.get_memory_tensors()) // num_pages  # type: ignore[attr-defined]
    with Engine(model, None, cache, max_requests=options.conversations) as engine:
        engine.generate([work.system], max_new_tokens=1)
        engine.generate(work.prompts(options.conversations), max_new_tokens=2, stop_tokens=())
        num_bytes = (num_pages - manager.available_pages_count) * page_bytes
        times = []
        for prompt in work.prompts(REPEATS):
            (request,) = engine.generate([prompt], max_new_tokens=1)
            times.append(request.time_to_first_token or 0.0)
        requests = first_tokens(engine, work.prompts(options.batch), options.new)
        begin, num_first = time.perf_counter(), sum(len(request.tokens) for request in requests)
        engine.wait(requests)
        rate = (sum(len(request.tokens) for request in requests) - num_first) / (time.perf_counter() - begin)
        cache.check()
    return {"kv_bytes": num_bytes, "first_token_ms": statistics.median(times) * 1e3, "tokens_per_s": rate}


def with_dynamic_caches(caches: DynamicCaches, work: Conversations, options: argparse.Namespace) -> dict[str, float]:
    """The measures of a cache for each conversation."""
    one, _ = caches.begin(work.prompts(1)[0])
    held = [one] + [copy.deepcopy(one) for _ in range(options.conversations - 1)]  # what each would compute is as large
    num_bytes = sum(caches.num_bytes(cache) for cache in held) + (caches.num_bytes(caches.kept) if caches.kept else 0)
    del held
    times = []
    for prompt in work.prompts(REPEATS):
        begin = time.perf_counter()
        caches.begin(prompt)
        times.append(time.perf_counter() - begin)
    batch = [[copy.deepcopy(one), 5] for _ in range(options.batch)]
    begin = time.perf_counter()
    for _ in range(options.new - 1):
        for each in batch:
            each[1] = caches.forward([each[1]], each[0])
    rate = options.batch * (options.new - 1) / (time.perf_counter() - begin)
    return {"kv_bytes": num_bytes, "first_token_ms": statistics.median(times) * 1e3, "tokens_per_s": rate}


def padded_batch(caches: DynamicCaches, work: Conversations, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one cache for the whole batch."""
    one, _ = caches.begin(work.prompts(1)[0])
    one.batch_repeat_interleave(options.batch)
    tokens = torch.full((options.batch, 1), 5)
    with torch.inference_mode():
        begin = time.perf_counter()
        for _ in range(options.new - 1):
            tokens = caches.logits(tokens, one)[:, -1].argmax(-1, keepdim=True)
    return {"tokens_per_s": options.batch * (options.new - 1) / (time.perf_counter() - begin)}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recorded = Path("benchmarks/results/chat_baseline.jsonl")
    parser.add_argument("--out", type=Path, help=f"{recorded} by default; with --tiny none")
    for name, value in (("conversations", 32), ("system", 1000), ("batch", 8), ("new", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tiny", action="store_true", help="random weights of a tiny shape, to see it run")
    options = parser.parse_args()
    tiny = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = llama("cpu", torch.float32, **tiny, **heads) if options.tiny else smollm2()
    work = Conversations(model.config.vocab_size, options.system)
    found = {
        "engine": with_engine(model, work, options),
        "cache each": with_dynamic_caches(DynamicCaches(model, None), work, options),
        "copies": with_dynamic_caches(DynamicCaches(model, work.system), work, options),
        "padded batch": padded_batch(DynamicCaches(model, work.system), work, options),
    }
    sizes = {name: getattr(options, name) for name in ("conversations", "system", "batch", "new")}
    about = {
        "options": sizes | {"model": "tiny" if options.tiny else "SmolLM2-135M-Instruct", "page_size": PAGE_SIZE},
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": machine(),
    }
    lines = [
        json.dumps({"impl": impl, **{k: round(v, 2) for k, v in row.items()}, **about}) for impl, row in found.items()
    ]
    print(*lines, sep="\n")
    out = options.out or (None if options.tiny else recorded)
    if out is not None:
        out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
