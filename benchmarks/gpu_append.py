"""Attention of new turns over a prompt that they share, on a GPU: flashinfer's prefill by hand, and levels.

    python -m benchmarks.gpu_append --out DIR

A batch of sequences on one prompt, each with so many new tokens whose queries are computed at once:

plain_fa2, plain_fa3   flashinfer's paged prefill wrapper, planned by hand: each sequence reads the prompt for itself
ours                   the levels that the cost model keeps
every_run              the shared prompt as a level, whatever it costs

Writes a row for each shape to DIR/append.jsonl and prints a line. A step is planned once and run in four layers, each
with memory of its own, so that the L2 cache keeps little from one replay to the next; times are a layer's, errors those
of the last layer against float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_about import about_run
from benchmarks.gpu_batches import on_one_prompt, with_values
from benchmarks.gpu_shapes import PAGE_SIZE, Shape, one_prefix
from benchmarks.gpu_timing import device_us
from seqattn import PagedAttention, PagedKVCacheManager
from seqattn.packed import FlashInferHybridData
from tests.gpu.batches import attend, relative_error
from tests.seqattn.truth import Batch

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS = 32, 8, 128, 4

#: attention in one layer: its number, and the output
Layer = Callable[[int], torch.Tensor]


#: sequences, tokens of the prompt that they share, new tokens of each
SHAPES = [
    one_prefix(16, 8192, 16),
    one_prefix(16, 8192, 128),
    one_prefix(16, 8192, 512),
    one_prefix(64, 8192, 16),
    one_prefix(64, 8192, 64),
    one_prefix(64, 8192, 256),
    one_prefix(64, 1024, 64),
    one_prefix(8, 32768, 128),
    one_prefix(128, 4096, 32),
    one_prefix(4, 2048, 64),
]


class Step:
    """A batch in memory; its sequences have their new tokens, and `q` is the queries of these."""

    def __init__(self, shape: Shape, device: str = "cuda", backend: str = "flashinfer") -> None:
        self.shape = shape
        num_pages = (shape.system_len + shape.batch * shape.own_len) // PAGE_SIZE
        sizes = (num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16)
        self.manager = with_values(PagedKVCacheManager(*sizes, device, num_layers=NUM_LAYERS))
        self.ids, self.query_lens = list(range(shape.batch)), [shape.own_len] * shape.batch
        self.descriptor = on_one_prompt(self.manager, shape.system_len, self.query_lens)
        num_rows = shape.batch * shape.own_len
        self.q = torch.randn(num_rows, NUM_QO_HEADS, HEAD_DIM, device=device, dtype=self.manager.dtype)
        self.attention = PagedAttention(self.manager, NUM_QO_HEADS, backend=backend)

    def packed(self, *, is_chosen: bool) -> FlashInferHybridData:
        """The batch in levels: those that the cost model keeps, or every shared run."""
        model = self.attention.cost_model if is_chosen else None
        return self.descriptor.pack_hybrid_for_flashinfer(self.ids, query_lens=self.query_lens, cost_model=model)

    def ours(self, data: FlashInferHybridData) -> Layer:
        """A layer of these levels, planned; until the next plan."""
        self.attention.plan(data)
        return lambda layer: self.attention.run(self.q, layer=layer)

    def kernels(self) -> list[str]:
        """The calls that are planned, each with its number of page lists."""
        return [f"{call.kind[0]}:{len(call.kv_last_page_len)}" for call in self.attention._prepared.work.calls]

    def expected(self) -> torch.Tensor:
        """The output of the last layer in float32."""
        tables, lens = self.descriptor.tables(self.ids)
        batch = Batch(PAGE_SIZE, [table.copy() for table in tables], lens.tolist(), self.query_lens)
        return attend(self.manager, batch, self.q, layer=NUM_LAYERS - 1)[0]


def plain_by_hand(step: Step, kernel: str) -> Layer:
    """The paged prefill wrapper of flashinfer as its documentation has it, planned; a layer of it."""
    import flashinfer

    q, manager, shape = step.q, step.manager, step.shape
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=kernel)
    data = step.descriptor.pack_for_flashinfer(step.ids)
    qo_indptr = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.own_len
    tables = (qo_indptr, data.kv_page_indptr, data.kv_page_indices.to(q.device), data.kv_last_page_len)
    sizes = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
    wrapper.plan(*tables, *sizes, causal=True, q_data_type=manager.dtype, kv_data_type=manager.dtype)
    out = torch.empty_like(q)  # without one it fills a new one with zeros, in every layer

    def layer_of(layer: int) -> torch.Tensor:
        found: torch.Tensor = wrapper.run(q, manager.layer_tensors(layer), out=out)
        return found

    return layer_of


def time_of(layer_of: Layer) -> tuple[float, float]:
    """Microseconds of a layer, and their spread."""
    return device_us(lambda: [layer_of(layer) for layer in range(NUM_LAYERS)], NUM_LAYERS)


def measure(step: Step) -> dict[str, Any]:
    """One shape in every way."""
    row: dict[str, Any] = {"shape": list(step.shape), "name": str(step.shape)}
    expected = step.expected()

    def note(way: str, layer_of: Layer) -> None:
        row[f"{way}_error"] = relative_error(layer_of(NUM_LAYERS - 1), expected)
        row[f"{way}_us"], row[f"{way}_spread"] = time_of(layer_of)

    plain = {f"plain_{kernel}": plain_by_hand(step, kernel) for kernel in ("fa2", "fa3")}
    for way, layer_of in plain.items():
        note(way, layer_of)
    for way, is_chosen in (("ours", True), ("every_run", False)):
        data = step.packed(is_chosen=is_chosen)
        note(way, step.ours(data))
        row |= {f"{way}_levels": len(data.levels), f"{way}_kernels": step.kernels()}
    for way, layer_of in plain.items():  # how much the clocks have moved meanwhile
        row[f"{way}_again_us"], _ = time_of(layer_of)
    return row


def line_of(row: dict[str, Any]) -> str:
    """A row in words, beside the faster of the plain ones."""
    plain = min(row["plain_fa2_us"], row["plain_fa3_us"])
    return (
        f"{row['name']:18} plain fa2 {row['plain_fa2_us']:8} fa3 {row['plain_fa3_us']:8} ours {row['ours_us']:8} "
        f"{plain / row['ours_us']:5.2f}x {row['ours_kernels']} every run {row['every_run_us']:8} "
        f"{plain / row['every_run_us']:5.2f}x {row['every_run_kernels']} error {row['ours_error']:.1e}"
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    about = about_run() | {"heads": [NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM], "dtype": "torch.bfloat16"}
    print(json.dumps(about))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "append.jsonl").open("w", encoding="utf-8") as file:
        print(json.dumps(about), file=file, flush=True)
        for shape in SHAPES:
            row = measure(Step(shape))
            print(json.dumps(row), file=file, flush=True)
            print(line_of(row), flush=True)


if __name__ == "__main__":
    main()
