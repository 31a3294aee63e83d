"""A decode step of a whole model on a GPU: plan, then append and attention in every layer; and forks of page tails.

    python -m benchmarks.gpu_step --out DIR [--batch 256] [--shared 8192] [--own 512] [--layers 32] [--steps 40]

Plain and hybrid packing of one batch that grows by a token a step, and is cut back before it grows by a page:

- eager: by the clock on the wall, the device idle before each step; packing, planning and every layer.
- replay: the same step through `DecodeGraphs`, captured in the first steps.
- graph: GPU time of all layers as one CUDA graph, without packing and planning.
- captured: GPU time of the graph that `DecodeGraphs` replayed last.
- plan and layers: what the CPU takes until `plan`, and `run` in every layer, return; beside it flashinfer's own calls
  made by hand on the same data: a plan for each level from packed tensors on the CPU, and the wrappers' `run`.
- plan_all_new: `plan` of a batch of which nothing is known; in the steps that follow, shared levels are.

Prints rows of JSON and writes them to DIR/step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_about import about_run
from benchmarks.gpu_batches import on_one_prompt, with_values
from benchmarks.gpu_timing import between_events, copy_rate, device_us
from seqattn import DecodeGraphs, DecodeStep, PagedAttention, PagedKVCacheManager
from seqattn.attention.plan import Planner

PAGE_SIZE, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 32, 8, 128


class Model:
    """A cache with a batch of sequences that share a prefix, and rows to append and to ask with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.batch, self.num_layers = options.batch, options.layers
        num_pages = options.shared // PAGE_SIZE + options.batch * (options.own // PAGE_SIZE + 4)
        sizes = (num_pages + 160, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16)
        self.manager = with_values(PagedKVCacheManager(*sizes, "cuda", num_layers=self.num_layers))
        self.ids = list(range(options.batch))
        self.descriptor = on_one_prompt(self.manager, options.shared, [options.own] * options.batch)
        self.attention = PagedAttention(self.manager, NUM_QO_HEADS)
        self.q = torch.randn(options.batch, NUM_QO_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.rows = torch.randn(2, options.batch, NUM_KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.indptr = torch.arange(options.batch + 1, dtype=torch.int32)
        self.cost_model = self.attention.cost_model
        self.num_tokens = options.shared + options.own
        self.packed: Any = None
        self.data: Any = None
        self.graphs = DecodeGraphs(self.attention, self.captured, [options.batch], max_tokens=self.num_tokens + 64)

    def shorten(self) -> None:
        """Brings every sequence back to its first length."""
        for i in self.ids:
            self.descriptor.truncate(i, self.num_tokens)

    def pack(self, *, hybrid: bool) -> Any:  # noqa: ANN401  either kind of data
        """The batch packed for attention; `packed` is what is appended by."""
        self.packed = self.descriptor.pack_for_flashinfer(self.ids)
        if not hybrid:
            return self.packed
        return self.descriptor.pack_hybrid_for_flashinfer(self.ids, cost_model=self.cost_model)

    def attend(self) -> None:
        """Attention in every layer."""
        for layer in range(self.num_layers):
            self.attention.run(self.q, layer=layer)

    def layers(self) -> None:
        """Append and attention in every layer."""
        for layer in range(self.num_layers):
            self.manager.append_kv(self.rows[0], self.rows[1], self.packed, self.indptr, layer=layer)
            self.attention.run(self.q, layer=layer)

    def captured(self, step: DecodeStep, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The same for `DecodeGraphs`."""
        out = q
        for layer in range(self.num_layers):
            step.append_kv(keys, values, layer=layer)
            out = step.run(q, layer=layer)
        return out

    def append(self) -> None:
        """Append in every layer."""
        for layer in range(self.num_layers):
            self.manager.append_kv(self.rows[0], self.rows[1], self.packed, self.indptr, layer=layer)

    def plan(self) -> None:
        """A plan for what was packed last."""
        self.attention.plan(self.data)

    def plan_all_new(self) -> None:
        """The same as if no level had been planned before."""
        impl: Any = self.attention._impl
        self.attention._planner = Planner(self.manager)
        impl._known = impl._codes = None
        for wrappers in impl.sets:
            for found in wrappers._by_kind.values():
                for wrapper in found:
                    wrapper.planned = None
        self.attention.plan(self.data)

    def pack_anew(self, *, hybrid: bool) -> None:
        """Packs after a new token for each sequence."""
        self.descriptor.allocate_decoding(self.ids)
        self.pack(hybrid=hybrid)

    def eager_step(self, *, hybrid: bool) -> None:
        """A step without a graph."""
        self.descriptor.allocate_decoding(self.ids)
        self.data = self.pack(hybrid=hybrid)
        self.plan()
        self.layers()

    def replayed_step(self, *, hybrid: bool) -> None:
        """A step with one."""
        self.descriptor.allocate_decoding(self.ids)
        if hybrid:
            data = self.descriptor.pack_hybrid_for_flashinfer(self.ids, cost_model=self.cost_model)
            self.graphs.replay(data, self.q, *self.rows)
        else:
            self.graphs.replay(self.descriptor.pack_for_flashinfer(self.ids), self.q, *self.rows)

    def last_replayed(self) -> Callable[[], None]:
        """Replays the graph of the last step with one, which computes that step again."""
        graph = next(reversed(self.graphs._steps.values()))._graph
        assert graph is not None
        return graph.replay


class ByHand:
    """flashinfer's calls for what the model has planned: wrappers of their own, planned from packed tensors."""

    def __init__(self, model: Model) -> None:
        import flashinfer

        self.model = model
        self.prepared = model.attention._prepared
        self.wrappers = []
        for call in self.prepared.work.calls:
            space = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
            if call.kernel == "decode":
                options = {"use_tensor_cores": True, "backend": "fa2"}
                self.wrappers.append(flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", **options))
            else:
                self.wrappers.append(flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend=call.kernel))

    def follow(self) -> None:
        """Plans what the model has planned, for runs in the same memory."""
        self.prepared = self.model.attention._prepared
        self.plan()

    def plan(self) -> None:
        """A plan for each level of what the model planned last."""
        for call, wrapper in zip(self.prepared.work.calls, self.wrappers, strict=True):
            names = ("qo_indptr", "kv_page_indptr", "kv_page_indices", "kv_last_page_len")
            tables = [torch.from_numpy(getattr(call, name)) for name in names]
            heads = (NUM_KV_HEADS if call.by_group else NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
            types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
            if call.kernel == "decode":
                wrapper.plan(*tables[1:], *heads, **types)
            else:
                wrapper.plan(*tables, *heads, causal=call.causal, **types)

    def run(self) -> None:
        """The wrappers in every layer, one after the other; the project's kernels gather queries and merge results."""
        q, views = self.model.q, self.prepared.scratch.views
        for layer in range(self.model.num_layers):
            caches = (self.model.manager.key_cache[layer], self.model.manager.value_cache[layer])
            if self.prepared.work.direct:
                self.wrappers[0].run(q, caches)
                continue
            launcher, scratch = self.model.attention._impl._launcher, self.prepared.scratch  # type: ignore[attr-defined]
            launcher.gather_queries(q, self.prepared.codes[0], scratch.gathered, NUM_QO_HEADS // NUM_KV_HEADS)
            for wrapper, (queries, out, lse) in zip(self.wrappers, views, strict=True):
                wrapper.run(q if queries is None else queries, caches, out=out, lse=lse, return_lse=True)
            out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
            parts = (scratch.part_out, scratch.part_lse, *self.prepared.codes[1:])
            launcher.merge_parts(*parts, out, lse, heads_each=NUM_QO_HEADS // NUM_KV_HEADS)


def timed(call: Callable[[], object], *, wait: bool = False) -> float:
    """Microseconds of the CPU until the call returns, the device idle before; with `wait` until the device is, too."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if wait:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6


def measure_step(model: Model, options: argparse.Namespace, *, hybrid: bool) -> dict[str, Any]:
    """One way of packing; every step has a new token for each sequence."""
    times: dict[str, list[float]] = {}
    hand: ByHand | None = None

    def note(name: str, call: Callable[[], object], *, wait: bool = False) -> None:
        model.descriptor.allocate_decoding(model.ids)
        model.data = model.pack(hybrid=hybrid)
        times.setdefault(name, []).append(timed(call, wait=wait))

    for number in range(options.steps):
        model.shorten()
        note("eager", lambda: model.eager_step(hybrid=hybrid), wait=True)
        note("replay", lambda: model.replayed_step(hybrid=hybrid), wait=True)
        note("pack", lambda: model.pack_anew(hybrid=hybrid))
        hand = hand or ByHand(model)
        for name, call in (("plan", model.plan), ("plan_by_hand", hand.plan), ("plan_all_new", model.plan_all_new)):
            # Each finds the caches of the CPU as the same calls left them, and shared levels planned, in both sets.
            for before in (hand.plan, model.plan, model.plan):
                before()
            note(name, call)
        model.plan()
        model.plan()
        hand.follow()
        runs = [("layers", model.attend), ("layers_by_hand", hand.run)]
        for name, call in runs[number % 2 :] + runs[: number % 2]:
            times.setdefault(name, []).append(timed(call))
            times.setdefault(f"{name}_done", []).append(timed(call, wait=True))
        note("append", model.append)
    captured = round(statistics.median(between_events(model.last_replayed())[3:]), 2)
    graph, spread = device_us(model.layers, 1)
    medians = {f"{name}_us": round(statistics.median(found[3:]), 1) for name, found in times.items()}
    packing = "hybrid" if hybrid else "plain"
    return {"packing": packing} | medians | {"captured_us": captured, "graph_us": graph, "graph_spread": spread}


def measure_forks(model: Model, num_forks: int = 64) -> dict[str, Any]:
    """The tails of forks in all layers, eight slots each: from the call to the end of its kernel, the CPU ahead."""
    model.shorten()
    pages = model.manager.allocate(2 * num_forks)
    slots = np.full(num_forks, 8)
    times = between_events(lambda: model.manager.copy_page_slots(pages[:num_forks], pages[num_forks:], slots), 60)
    model.manager.unref(pages)
    moved = 2 * 2 * num_forks * 8 * NUM_KV_HEADS * HEAD_DIM * 2 * model.num_layers
    us = {"us": round(statistics.median(times[10:]), 1), "slowest_us": round(max(times[10:]), 1)}
    return {"forks": num_forks} | us | {"bytes_us": round(moved / copy_rate() * 1e6, 1)}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in (("batch", 256), ("shared", 8192), ("own", 512), ("layers", 32), ("steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Model(options)
    rows = [measure_step(model, options, hybrid=hybrid) for hybrid in (False, True)] + [measure_forks(model)]
    options.out.mkdir(parents=True, exist_ok=True)
    about = about_run() | {name: value for name, value in vars(options).items() if name != "out"}
    with (options.out / "step.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(about | row), flush=True)
            print(json.dumps(about | row), file=file)


if __name__ == "__main__":
    main()
