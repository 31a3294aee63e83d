"""A decode step of a whole model on a GPU: plan, then append and attention in every layer; and forks of page tails.

    python -m benchmarks.gpu_step --out DIR [--batch 256] [--shared 8192] [--own 512] [--layers 32]

Plain and hybrid packing of one batch, by the clock on the wall with the device idle before each step ("eager"), and
as a CUDA graph of all layers ("graph"). Prints rows of JSON and writes them to DIR/step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_timing import copy_rate, device_us
from seqattn import CacheDescriptor, PagedAttention, PagedKVCacheManager

PAGE_SIZE, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 32, 8, 128
REPEATS = 10


class Model:
    """A cache with a batch of sequences that share a prefix, and rows to append and to ask with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.batch, self.num_layers = options.batch, options.layers
        num_pages = options.shared // PAGE_SIZE + options.batch * (options.own // PAGE_SIZE + 8) + 128
        sizes = (num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16)
        self.manager = PagedKVCacheManager(*sizes, "cuda", num_layers=self.num_layers)
        for cache in self.manager.get_memory_tensors():
            cache.normal_()
        self.descriptor = CacheDescriptor(self.manager)
        self.descriptor.allocate(["prompt"], [options.shared])
        self.ids = list(range(options.batch))
        for i in self.ids:
            self.descriptor.fork("prompt", i)
        self.descriptor.allocate(self.ids, [options.own] * options.batch)
        self.attention = PagedAttention(self.manager, NUM_QO_HEADS)
        self.q = torch.randn(options.batch, NUM_QO_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.rows = torch.randn(2, options.batch, NUM_KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.indptr = torch.arange(options.batch + 1, dtype=torch.int32)

    def plan(self, *, hybrid: bool) -> None:
        """Packs and plans the step."""
        self.packed = self.descriptor.pack_for_flashinfer(self.ids)
        if hybrid:
            model = self.attention.cost_model
            self.attention.plan(self.descriptor.pack_hybrid_for_flashinfer(self.ids, cost_model=model))
        else:
            self.attention.plan(self.packed)

    def layers(self) -> None:
        """Append and attention in every layer."""
        for layer in range(self.num_layers):
            self.manager.append_kv(self.rows[0], self.rows[1], self.packed, self.indptr, layer=layer)
            self.attention.run(self.q, layer=layer)

    def step(self, *, hybrid: bool) -> float:
        """A step with one new token for each sequence; microseconds."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.descriptor.allocate_decoding(self.ids)
        self.plan(hybrid=hybrid)
        self.layers()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e6


def measure_step(model: Model, *, hybrid: bool) -> dict[str, Any]:
    """One way of packing, eager and as a graph."""
    eager = [model.step(hybrid=hybrid) for _ in range(3 + REPEATS)][3:]
    plans = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.plan(hybrid=hybrid)
        plans.append((time.perf_counter() - begin) * 1e6)
    graph, spread = device_us(model.layers, 1)
    return {
        "packing": "hybrid" if hybrid else "plain",
        "eager_us": round(statistics.median(eager)),
        "pack_and_plan_us": round(statistics.median(plans)),
        "graph_us": graph,
        "graph_spread": spread,
    }


def measure_forks(model: Model, num_forks: int = 64) -> dict[str, Any]:
    """The tails of forks in all layers, eight slots each: the kernel alone, and the call."""
    pages = model.manager.allocate(2 * num_forks)
    slots = np.full(num_forks, 8)
    times = []
    for _ in range(30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]  # the CPU is ahead when the copy starts
        begin.record()
        model.manager.copy_page_slots(pages[:num_forks], pages[num_forks:], slots)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    moved = 2 * 2 * num_forks * 8 * NUM_KV_HEADS * HEAD_DIM * 2 * model.num_layers
    return {"forks": num_forks, "us": round(statistics.median(times[3:]), 1), "bytes_us": moved / copy_rate() * 1e6}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in (("batch", 256), ("shared", 8192), ("own", 512), ("layers", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Model(options)
    rows = [measure_step(model, hybrid=hybrid) for hybrid in (False, True)] + [measure_forks(model)]
    options.out.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in vars(options).items() if name != "out"}
    with (options.out / "step.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(about | row))
            print(json.dumps(about | row), file=file)


if __name__ == "__main__":
    main()
