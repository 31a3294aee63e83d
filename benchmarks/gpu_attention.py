"""Decode attention on a GPU: plain, flashinfer's own cascade, and levels composed and chosen by this library.

    python -m benchmarks.gpu_attention --out DIR [--only known|random|ragged|uneven|mixed] [--every-choice]
        [--heads 32 8 128] [--random 20] [--seed 0] [--scattered] [--ragged] [--uneven] [--mixed] [--dtype bfloat16]

Writes a row for each measurement to DIR/rows.jsonl and prints a table. A step is planned once and run in four layers,
each with memory of its own, so that the L2 cache keeps nothing from one replay to the next; times are a layer's.

"ours" is the planner's choice. "planner" is the time of the CPU from the forest to that choice, "planner again" that
of the steps after it, and "forest" from page tables to the forest. A seed draws shapes
that the constants of the planner were not fitted to.

Prompts and documents lie side by side in memory, as a fresh allocator hands out pages, the rest in random places;
"scattered" is ours with every page in a random place, and with --scattered all is measured so. Sequences of "ragged"
shapes, and of all with --ragged, have between a quarter of the own tokens that the shape says and twice as many. So
have those of "uneven" shapes, and of all with --uneven; and so have documents of their tokens, and the n-th of a system
prompt is asked by sequences in proportion to 1 / n. Own tokens of "mixed" shapes, and of all with --mixed, are
log-normal. Choices that begin with "long" have levels for long lists of single sequences (`seqattn.long_lists`).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_about import about_run
from benchmarks.gpu_batches import with_values
from benchmarks.gpu_by_hand import NUM_LAYERS, cascade_by_hand, plain_by_hand
from benchmarks.gpu_shapes import (
    KNOWN,
    LONG,
    MIXED,
    PAGE_SIZE,
    RAGGED,
    UNEVEN,
    Shape,
    random_shapes,
    scattered,
    tables_of,
)
from benchmarks.gpu_timing import copy_rate, device_us, host_us, matrix_rate
from seqattn import PagedAttention, PagedKVCacheManager
from seqattn.attention.calls import Choice
from seqattn.attention.plan import plan_batch
from seqattn.forest import Run, build_forest, depths_of
from seqattn.hybrid import pack_hybrid, pack_runs
from seqattn.long_lists import runs_to_keep, with_long_lists
from seqattn.packed import FlashInferHybridData
from tests.gpu.batches import attend, relative_error
from tests.seqattn.truth import Batch

SLICES = (1, 2, 4, 8)
#: operations a second of the serial bound's matrix work
MATRIX_RATE = 700e12


class Step:
    """A batch in memory, with what is needed to compute it in every way."""

    def __init__(self, shape: Shape, options: argparse.Namespace) -> None:
        self.shape = shape
        heads: list[int] = options.heads
        self.num_qo_heads, num_kv_heads, head_dim = heads
        self.tables = tables_of(
            shape,
            options.seed,
            in_line=not options.scattered,
            **{how: getattr(options, how) for how in ("ragged", "uneven", "mixed")},
        )
        self.scattered = scattered(self.tables, options.seed)
        self.lens = np.array([len(table) * PAGE_SIZE for table in self.tables], dtype=np.int64)
        self.ones = np.ones_like(self.lens)
        num_pages = 1 + max(int(table.max()) for table in self.tables)
        sizes = (num_pages, PAGE_SIZE, num_kv_heads, head_dim, getattr(torch, options.dtype))
        self.manager = with_values(PagedKVCacheManager(*sizes, "cuda", num_layers=NUM_LAYERS))
        self.q = torch.randn(shape.batch, self.num_qo_heads, head_dim, device="cuda", dtype=self.manager.dtype)
        self.attention = PagedAttention(self.manager, self.num_qo_heads, backend="flashinfer")
        self.cost_model = self.attention.cost_model
        self.forest = self.build()
        self.bytes = len(np.unique(np.concatenate(self.tables))) * PAGE_SIZE * num_kv_heads * head_dim * 4

    def packed(self, cost_model: Any, tables: list[Any] | None = None) -> FlashInferHybridData:  # noqa: ANN401  what pack_hybrid takes
        """Levels as the planner would have them."""
        tables = self.tables if tables is None else tables
        return pack_hybrid(tables, self.lens, page_size=PAGE_SIZE, query_lens=None, cost_model=cost_model)

    def build(self) -> tuple[list[int], list[Run]]:
        """The forest of the page tables."""
        return build_forest(self.tables, ((self.lens - 1) // PAGE_SIZE).tolist())

    def planned(self, *, first: bool) -> list[Run]:
        """From the forest to the runs that pay, as if for the first time or once more."""
        if first and self.cost_model.device is not None:
            self.cost_model.device.chosen.clear()
        return runs_to_keep(self.forest[1], np.arange(len(self.lens) + 1), *self._sizes, PAGE_SIZE, self.cost_model)

    @property
    def _sizes(self) -> tuple[Any, Any]:
        """Tokens, and pages that levels above the last may have, in the order of the forest."""
        lens = self.lens[np.array(self.forest[0])]
        return lens, (lens - 1) // PAGE_SIZE

    @property
    def with_long(self) -> list[Run]:
        """The runs of the forest, and those of long lists."""
        assert self.cost_model.device is not None
        return with_long_lists(self.forest[1], *self._sizes, PAGE_SIZE, self.cost_model.device, self.cost_model.heads)

    def layers(self) -> None:
        """The planned step in every layer."""
        for layer in range(NUM_LAYERS):
            self.attention.run(self.q, layer=layer)

    def in_random_places(self) -> tuple[float, float]:
        """Time of the planned step with every page in a random place."""
        self.choose(self.packed(self.cost_model, self.scattered), None)
        return device_us(self.layers, NUM_LAYERS)

    def choose(self, data: FlashInferHybridData, choices: Sequence[Choice] | None) -> None:
        """Plans levels with these kernels."""
        self.attention.plan(data)
        if choices is not None:
            plan = plan_batch(self.manager, data, None, causal=True)
            self.attention._prepared = self.attention._impl.prepare(plan, choices)  # type: ignore[call-arg]

    def error(self) -> float:
        """Relative error of the planned step on fresh queries, in the last layer."""
        self.q.normal_()
        batch = Batch(PAGE_SIZE, self.tables, self.lens.tolist(), [1] * len(self.tables))
        layer = NUM_LAYERS - 1
        out = self.attention.run(self.q, layer=layer)
        return relative_error(out, attend(self.manager, batch, self.q, layer=layer)[0])

    def work_us(self, rates: dict[str, float]) -> float:
        """The serial bound: every page once at the rate of a copy, shared tokens' matrix work at `MATRIX_RATE`."""
        _, runs = self.forest
        head_dim = self.manager.head_dim
        shared = sum((run.stop - run.first) * (run.end - run.begin) * PAGE_SIZE for run in runs)
        return self.bytes / rates["copy"] * 1e6 + 4 * shared * self.num_qo_heads * head_dim / MATRIX_RATE * 1e6


def every_choice(step: Step) -> Iterator[tuple[str, FlashInferHybridData, list[Choice]]]:
    """Plain attention; all subsets of the forest's depths, at most three levels, with every kernel for each.

    Then the same with long lists, of those depths of which some have one.
    """
    _, runs = step.forest
    yield "plain", _with_depths(step, runs, ()), [Choice("decode")]
    yield from _levels(step, runs, set(depths_of(runs)))
    longer = step.with_long
    alone = {depth for run, depth in zip(longer, depths_of(longer), strict=True) if run.stop - run.first == 1}
    for name, data, choices in _levels(step, longer, alone):
        yield f"{LONG}{name}", data, choices


def _levels(step: Step, runs: list[Run], among: set[int]) -> Iterator[tuple[str, FlashInferHybridData, list[Choice]]]:
    """One or two depths of these runs as levels, at least one of them among those, in every way."""
    ways = [Choice("fa2"), *(Choice("fa3", slices) for slices in SLICES)]
    depths = sorted(set(depths_of(runs)))
    for kept in (*itertools.combinations(depths, 1), *itertools.combinations(depths, 2)):
        if among.isdisjoint(kept):
            continue
        data = _with_depths(step, runs, kept)
        for chosen in itertools.product(ways, repeat=len(kept)):
            name = "+".join(f"{d}:{way.kernel}x{way.slices}" for d, way in zip(kept, chosen, strict=True))
            yield name, data, [*chosen, Choice("decode")]


def _with_depths(step: Step, runs: list[Run], kept: Collection[int]) -> FlashInferHybridData:
    """The batch with the runs of these depths as levels."""
    mask = [depth in kept for depth in depths_of(runs)]
    return pack_runs(step.tables, step.lens, step.ones, (step.forest[0], runs), mask, page_size=PAGE_SIZE)


def measure(step: Step, rates: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """One shape in every way."""
    row: dict[str, Any] = {
        "shape": list(step.shape),
        "name": str(step.shape),
        "bound_us": round(step.work_us(rates), 1),
    }
    runs: dict[str, Callable[[], None]] = {}
    for name, make in (("plain", plain_by_hand), ("cascade", cascade_by_hand)):
        plan, run = make(step)
        plan()
        runs[name] = run
        row[f"{name}_us"], row[f"{name}_spread"] = device_us(run, NUM_LAYERS)
        row[f"{name}_plan_us"], row[f"{name}_eager_us"] = host_us(plan), host_us(run) / NUM_LAYERS
    data = step.packed(step.cost_model)
    step.choose(data, None)
    row["levels"] = len(data.levels)
    row["kernels"] = [f"{c.kind[0]}:{len(c.kv_last_page_len)}" for c in step.attention._prepared.work.calls]
    row["error"] = step.error()
    row["ours_us"], row["ours_spread"] = device_us(step.layers, NUM_LAYERS)
    row["plain_again_us"], _ = device_us(runs["plain"], NUM_LAYERS)  # how much the clocks have moved meanwhile
    row["ours_plan_us"], row["ours_eager_us"] = (
        host_us(lambda: step.choose(data, None)),
        host_us(step.layers) / NUM_LAYERS,
    )
    row["scattered_us"], row["scattered_spread"] = step.in_random_places()
    row["pack_us"] = host_us(lambda: step.packed(step.cost_model))
    row["forest_us"] = host_us(step.build)
    row["planner_us"] = host_us(lambda: step.planned(first=True))
    row["planner_again_us"] = host_us(lambda: step.planned(first=False))
    if options.every_choice:
        row["choices"] = {}
        for name, levels, choices in every_choice(step):
            step.choose(levels, choices)
            row["choices"][name] = device_us(step.layers, NUM_LAYERS)[0]
    return row


def parsed() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["known", "random", "ragged", "uneven", "mixed"])
    parser.add_argument("--scattered", action="store_true")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--uneven", action="store_true")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-choice", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128])
    options = parser.parse_args()
    options.ragged = options.ragged or options.only == "ragged"
    options.uneven = options.uneven or options.only == "uneven"
    options.mixed = options.mixed or options.only == "mixed"
    return options


def about_rows(rates: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common: the first line of the file."""
    return about_run() | {
        "copy TB/s": round(rates["copy"] / 1e12, 2),
        "matrix TFLOP/s": round(rates["matrix"] / 1e12),
        "heads": options.heads,
        "dtype": f"torch.{options.dtype}",
        "seed": options.seed,
        "in_line": not options.scattered,
        "ragged": options.ragged,
        "uneven": options.uneven,
        "mixed": options.mixed,
        "short_lists": "by the longest",
    }


def line_of(row: dict[str, Any]) -> str:
    """A row in words."""
    best = min(row.get("choices", {"": row["ours_us"]}).items(), key=lambda item: item[1])
    return (
        f"{row['name']:36} plain {row['plain_us']:8} cascade {row['cascade_us']:8} ours {row['ours_us']:8} "
        f"{row['plain_us'] / row['ours_us']:5.2f}x best {best[1]:8} {best[0]:18} bound {row['bound_us']:7} "
        f"error {row['error']:.1e} {row['kernels']}"
    )


def main() -> None:
    """Runs the benchmark."""
    options = parsed()
    torch.manual_seed(0)
    rates = {"copy": copy_rate(), "matrix": matrix_rate()}
    about = about_rows(rates, options)
    print(json.dumps(about))
    drawn = random_shapes(options.random, options.seed)
    shapes = {"known": KNOWN, "random": drawn, "ragged": RAGGED, "uneven": UNEVEN, "mixed": MIXED}.get(
        options.only, KNOWN + drawn
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "rows.jsonl").open("w", encoding="utf-8") as file:
        print(json.dumps(about), file=file)
        for shape in shapes:
            row = measure(Step(shape, options), rates, options)
            print(json.dumps(row), file=file, flush=True)
            print(line_of(row), flush=True)


if __name__ == "__main__":
    main()
