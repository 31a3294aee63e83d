"""What a step of shared levels is made of, on a GPU: each kernel alone, one after the other, and side by side.

    python -m benchmarks.gpu_parts --out DIR

The shapes for which a time near the serial bound was promised, each planned as `gpu_attention` plans it. Times are GPU
time of a layer, by replay of four:

ours      the step
in_turn   its kernels one after the other, on one stream
around    what is no attention: queries gathered, streams begun and joined, results merged
levels    the attention kernel of each level alone; beside it the least that it could take, in the terms of the bound:
          its pages at the rate of a copy, its matrix work at 700 TFLOP/s (of shared levels; the last has little)

Writes a row for each shape to DIR/parts.jsonl and prints a line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import evolve

from benchmarks.gpu_about import about_run
from benchmarks.gpu_attention import MATRIX_RATE, Step
from benchmarks.gpu_by_hand import NUM_LAYERS
from benchmarks.gpu_promises import OVER_BOUND
from benchmarks.gpu_shapes import KNOWN, PAGE_SIZE
from benchmarks.gpu_timing import copy_rate, device_us
from seqattn.packed import HybridLevel

#: 32 query and 8 KV heads of 128 in bfloat16, prompts and documents in one piece, as in the table of promises
AS_PROMISED = argparse.Namespace(
    heads=[32, 8, 128], dtype="bfloat16", seed=0, scattered=False, ragged=False, uneven=False, mixed=False
)


def least_us(level: HybridLevel, step: Step, copy: float, *, is_last: bool) -> tuple[float, float]:
    """Microseconds of a level's pages at the rate of a copy, and of its matrix work, none for the last level.

    Args:
        level: its groups are full pages.
        step: whose heads they are.
        copy: bytes a second.
        is_last: whether each sequence has a group of its own.
    """
    _, num_kv_heads, head_dim = AS_PROMISED.heads
    tokens = level.kv_page_indptr.diff() * PAGE_SIZE
    num_bytes = 4 * num_kv_heads * head_dim * int(tokens.sum())
    operations = 4 * step.num_qo_heads * head_dim * int((level.qo_indptr.diff() * tokens).sum())
    return num_bytes / copy * 1e6, 0.0 if is_last else operations / MATRIX_RATE * 1e6


@contextmanager
def without(step: Step, calls: Collection[int]) -> Iterator[None]:
    """The planned step without the attention kernels of these calls, all that is around them as it was."""

    def nothing(*_: object) -> None: ...

    attention: Any = step.attention
    prepared = attention._prepared
    runs = [(nothing, nothing) if i in calls else runs for i, runs in enumerate(prepared.runs)]
    attention._prepared = evolve(prepared, runs=runs)
    try:
        yield
    finally:
        attention._prepared = prepared


@contextmanager
def in_turn(step: Step) -> Iterator[None]:
    """The planned step on one stream."""
    impl: Any = step.attention._impl
    impl.overlap = False
    try:
        yield
    finally:
        impl.overlap = True


def alone(step: Step, i: int) -> Callable[[], None]:
    """The attention kernel of one call, in every layer."""
    attention: Any = step.attention

    def layers() -> None:
        for layer in range(NUM_LAYERS):
            attention._impl._run_call(step.q, layer, attention._prepared, i)

    return layers


def measure(step: Step, copy: float) -> dict[str, Any]:
    """One shape, and its parts."""

    def us(layers: Callable[[], object]) -> float:
        return device_us(layers, NUM_LAYERS)[0]

    data = step.packed(step.cost_model)
    step.attention.plan(data)
    calls = step.attention._prepared.work.calls
    assert len(calls) == len(data.levels), "a call for each level"
    row: dict[str, Any] = {"shape": list(step.shape), "name": str(step.shape)}
    row["bound_us"] = round(step.work_us({"copy": copy}), 1)
    row["ours_us"] = us(step.layers)
    with in_turn(step):
        row["in_turn_us"] = us(step.layers)
    with without(step, range(len(calls))):
        row["around_us"] = us(step.layers)
    row["levels"] = []
    for i, (call, level) in enumerate(zip(calls, data.levels, strict=True)):
        pages, matrix = least_us(level, step, copy, is_last=i == len(calls) - 1)
        kernel = f"{call.kind[0]}:{len(call.kv_last_page_len)}"
        least = {"pages_us": round(pages, 1), "matrix_us": round(matrix, 1)}
        row["levels"].append({"kernel": kernel, "us": us(alone(step, i))} | least)
    row["ours_again_us"] = us(step.layers)  # how much the clocks have moved meanwhile
    return row


def line_of(row: dict[str, Any]) -> str:
    """A row in words."""
    levels = "  ".join(
        f"{level['kernel']} {level['us']} (pages {level['pages_us']}, matrix {level['matrix_us']})"
        for level in row["levels"]
    )
    return (
        f"{row['name']:34} bound {row['bound_us']:6} ours {row['ours_us']:7} in turn {row['in_turn_us']:7} "
        f"around {row['around_us']:6}  {levels}"
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_rate()
    about = about_run() | {"copy TB/s": round(copy / 1e12, 2), "heads": AS_PROMISED.heads, "dtype": "torch.bfloat16"}
    print(json.dumps(about))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "parts.jsonl").open("w", encoding="utf-8") as file:
        print(json.dumps(about), file=file, flush=True)
        for shape in KNOWN:
            if str(shape) in OVER_BOUND:
                row = measure(Step(shape, AS_PROMISED), copy)
                print(json.dumps(row), file=file, flush=True)
                print(line_of(row), flush=True)


if __name__ == "__main__":
    main()
