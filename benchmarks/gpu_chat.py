"""Chat with a randomly initialised Llama of 1B shape on a GPU, through the engine.

    python -m benchmarks.gpu_chat --out DIR [--trace conversation_trace.jsonl.gz] [--only agree host decode …] [--tiny]

first    time to the first token of a new message after 8k and 32k cached tokens, and of the same prompt cold; without
         CUDA graphs, and with graphs once they are captured
join     the same of a message that joins conversations that decode, and the longest pause of these
decode   tokens per second of 64 conversations on one 8k system prompt: hybrid and plain packing, no CUDA graphs, graphs
         of each layer's attention, one graph of a whole step; steps launched when the one before is read, and ahead
static   the same by transformers' `generate` with a static cache, eager; `compiled` lets it compile its decoding
agree    ways to compute the same step: how often the greedy token is the same, by how many bfloat16 steps the two best
         logits are apart where it is not, and how far each way is from float32 (`gpu_chat_ways`)
host     microseconds of the CPU for each part of a decode step at batch 64, beside the model's forward with attention
         replaced by nothing; each part begins with the device idle
replay   10,000 requests of a recorded trace, a page for each of its blocks; `check()` every 1,000 and at the end

Sizes are those of Llama 3.2 1B, with 16 query heads and 4 KV heads of 128 instead of 32 and 8 of 64: as many parameters
and as much KV. Each part stands alone: one that fails leaves a row with its error. Prints rows of JSON and writes them
to DIR/chat.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from benchmarks.chat_models import llama
from benchmarks.gpu_about import about_run
from benchmarks.gpu_chat_first import first, join
from benchmarks.gpu_chat_host import host_rows
from benchmarks.gpu_chat_trace import prompts_of
from benchmarks.gpu_chat_ways import Ways
from radix import PrefixCache
from radix.integrations.transformers import Engine, Request, manager_for
from radix.integrations.transformers.runner import Packing

Row = dict[str, Any]
PAGE_SIZE = 16
#: packing, and what of a decode step is captured in CUDA graphs
VARIANTS: list[tuple[Packing, str]] = [
    (packing, graphs) for graphs in ("none", "attention", "step") for packing in ("plain", "hybrid")
]


class Sizes(NamedTuple):
    """What the parts measure."""

    cached: tuple[int, ...] = (8192, 32768)
    message: int = 64
    batch: int = 64
    system: int = 8192
    steps: int = 128
    budget: int = 8192
    requests: int = 10_000
    replay_pages: int = 8192


TINY = Sizes((64, 128), 8, 8, 64, 8, 128, 300, 256)


class Work:
    """The model, and prompts for it."""

    def __init__(self, device: str, sizes: Sizes, *, is_tiny: bool, trace: Path | None) -> None:
        heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
        tiny = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.model = llama(
            device, dtype, **(tiny | {"num_attention_heads": 4, "num_key_value_heads": 2} if is_tiny else heads)
        )
        self.sizes = sizes
        self.trace = trace
        self.random = np.random.default_rng(0)

    def tokens(self, num: int) -> list[int]:
        """Random token ids that end nothing."""
        ids: list[int] = self.random.integers(3, self.model.config.vocab_size, num).tolist()
        return ids

    def engine(
        self,
        num_pages: int,
        packing: Packing = "hybrid",
        max_requests: int = 64,
        graph_sizes: Sequence[int] | Literal["auto"] | None = "auto",
    ) -> Engine:
        """An engine over a new cache."""
        cache = PrefixCache(manager_for(self.model, num_pages=num_pages, page_size=PAGE_SIZE))
        budget = self.sizes.budget
        return Engine(
            self.model,
            None,
            cache,
            max_requests=max_requests,
            max_tokens_per_step=budget,
            packing=packing,
            graph_sizes=graph_sizes,
        )

    def batch_engine(self, packing: Packing, graphs: str = "none") -> tuple[Engine, list[Request]]:
        """Conversations that share a system prompt and have just got their first token; `graphs` as in `VARIANTS`."""
        sizes = self.sizes
        own = -(-(sizes.message + 2 * sizes.steps + 64) // PAGE_SIZE)
        num_pages = sizes.system // PAGE_SIZE + sizes.batch * own + 8
        graph_sizes = {"none": None, "attention": (), "step": (sizes.batch,)}[graphs]
        engine = self.engine(num_pages, packing, sizes.batch, graph_sizes)
        system = self.tokens(sizes.system)
        engine.generate([system], max_new_tokens=1)
        return engine, self.conversations(engine, system)

    def conversations(self, engine: Engine, system: list[int]) -> list[Request]:
        """A batch of conversations on a system prompt, up to their first token."""
        sizes = self.sizes
        prompts = [system + self.tokens(sizes.message) for _ in range(sizes.batch)]
        most = 2 * sizes.steps + 48
        requests = [engine.submit(prompt, max_new_tokens=most, stop_tokens=()) for prompt in prompts]
        while not all(request.tokens for request in requests):
            engine.step()
        return requests


def decode(work: Work) -> Iterator[Row]:
    """Tokens per second of the engine; graphs are those that conversations before these have captured."""
    for packing, graphs in VARIANTS:
        engine, requests = work.batch_engine(packing, graphs)
        with engine:
            if graphs != "none":
                engine.wait(requests)
                work.conversations(engine, requests[0].prompt[: work.sizes.system].tolist())
            for run_ahead in (False, True):
                engine.steps.run_ahead = run_ahead
                for _ in range(8):
                    engine.step()
                begin = time.perf_counter()
                for _ in range(work.sizes.steps):
                    engine.step()
                step = (time.perf_counter() - begin) / work.sizes.steps
                how = {"packing": packing, "graphs": graphs, "ahead": run_ahead}
                yield how | {"tokens_per_s": work.sizes.batch / step, "step_ms": step * 1e3}
            engine.cache.check()


def static(work: Work, *, is_compiled: bool = False) -> Iterator[Row]:
    """Tokens per second of `generate` with a static cache: two lengths, of which the difference is decoding."""
    sizes, model = work.sizes, work.model
    system = work.tokens(sizes.system)
    ids = torch.tensor([system + work.tokens(sizes.message) for _ in range(sizes.batch)], device=model.device)
    num_new = (4, 4 + max(4, sizes.steps // 4))
    times = {}
    for num in (num_new[1], *num_new) if is_compiled else num_new:
        begin = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num,
            max_new_tokens=num,
            cache_implementation="static",
            disable_compile=not is_compiled,
        )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times[num] = time.perf_counter() - begin
    seconds = (times[num_new[1]] - times[num_new[0]]) / (num_new[1] - num_new[0])
    yield {"tokens_per_s": sizes.batch / seconds, "step_ms": seconds * 1e3, "generate_s": times}


def compiled(work: Work) -> Iterator[Row]:
    """`static`, compiled as `generate` does by default."""
    yield from static(work, is_compiled=True)


def agree(work: Work) -> Iterator[Row]:
    """Greedy tokens of several ways on the same state, and how far each is from the truth."""
    engine, _ = work.batch_engine("hybrid")
    with engine:
        ways = Ways(engine)
        engine.steps.drop()
        engine.steps.runner, engine.steps.run_ahead = ways, False  # type: ignore[assignment]
        for _ in range(work.sizes.steps):
            engine.step()
    yield from ways.rows()


def host(work: Work) -> Iterator[Row]:
    """What a decode step costs the CPU, part by part."""
    for packing, graphs in VARIANTS:
        engine, _ = work.batch_engine(packing, graphs)
        with engine:
            yield {"packing": packing, "graphs": graphs} | host_rows(engine, work.sizes.steps // 4 + 2)


def replay(work: Work) -> Iterator[Row]:
    """A trace through the engine, pages short."""
    if work.trace is None:
        yield {"skipped": "give a trace with --trace"}
        return
    sizes = work.sizes
    with work.engine(sizes.replay_pages, max_requests=min(256, sizes.budget)) as engine:
        begin, requests, num_checks = time.perf_counter(), [], 0
        for number, (ids, num_new) in enumerate(
            prompts_of(work.trace, work.model.config.vocab_size, sizes.requests, PAGE_SIZE)
        ):
            requests.append(engine.submit(ids, max_new_tokens=num_new, stop_tokens=()))
            while engine.num_waiting > 256:
                engine.step()
            if number % 1000 == 999:
                engine.cache.check()
                num_checks += 1
        engine.wait(requests)
        seconds = time.perf_counter() - begin
        engine.cache.check()
        engine.cache.evict(sizes.replay_pages)
        num_lost = sizes.replay_pages - engine.cache.manager.available_pages_count
    yield {
        "requests": len(requests),
        "finished": sum(request.is_finished for request in requests),
        "seconds": seconds,
        "checks": num_checks + 1,
        "pages": sizes.replay_pages,
        "pages_lost": num_lost,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "cached_tokens": sum(request.num_cached_tokens or 0 for request in requests),
        "new_tokens": sum(len(request.tokens) for request in requests),
        "preemptions": sum(request.num_preemptions for request in requests),
        "evicted_pages": engine.cache.stats.num_evicted_pages,
    }


PARTS: dict[str, Callable[[Work], Iterator[Row]]] = {
    "host": host,
    "agree": agree,
    "decode": decode,
    "first": first,
    "join": join,
    "replay": replay,
    "static": static,
    "compiled": compiled,
}


def _machine() -> Row:
    """Where it ran, and on what."""
    versions = {}
    for name, package in (("torch", "torch"), ("transformers", "transformers"), ("flashinfer", "flashinfer-python")):
        with suppress(PackageNotFoundError):
            versions[name] = version(package).partition("+")[0]
    return about_run() | {"versions": versions}


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU where there is no GPU")
    options = parser.parse_args()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    sizes = TINY if options.tiny else Sizes()
    work = Work(device, sizes, is_tiny=options.tiny, trace=options.trace)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"batch": sizes.batch, "system": sizes.system} | _machine()
    with (options.out / "chat.jsonl").open("w", encoding="utf-8") as file:
        for part in options.only:
            begin = time.perf_counter()
            try:
                rows = list(PARTS[part](work))
            except Exception as error:
                traceback.print_exc()
                rows = [{"error": f"{type(error).__name__}: {error}"[:300]}]
            for row in rows:
                line = json.dumps({"part": part, **row, **about})
                print(line, f"# {time.perf_counter() - begin:.1f} s", flush=True)
                print(line, file=file, flush=True)
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
