"""What a step of shared levels is made of, on a GPU: each kernel alone, one after the other, and side by side.

    python -m benchmarks.gpu_parts --out DIR

The shapes for which a time near the serial bound was promised, each planned as `gpu_attention` plans it. Times are GPU
time of a layer, by replay of four, a replay's own time (replay_us, of an empty one) included:

parts
  ours             the step
  in turn          its kernels one after the other, on one stream
  level i alone    the attention kernel of one level; "levels" has its share of the bound: pages at the rate of a copy,
                   and for shared levels matrix work at 700 TFLOP/s, one after the other
  around           all that is no attention: queries gathered, the pause before lower levels, results merged
  without gathering, without merging    the step without one of these; its results are wrong
tried
  begun at once, one priority, last level first    the levels on their streams in other ways: without the pause by
                   which those below let the first begin, without priorities, in reverse
  gathering early, merging early, both early, merging early behind level 0    these kernels launched before what goes
                   ahead of them has ended (`gpu_early`); behind level 0: on its stream, not on that of the last level
  level i: fa3xn   that level in n slices of fa3, the others as planned

All take turns, each after a pause and some replays that do not count, so that what ran before matters little. Last the
step runs for a second and a half: hot_us is its time at the end, hot_mhz and hot_watts the lowest clock and the most
power that nvidia-smi saw until then.

Writes a row for each shape to DIR/parts.jsonl and prints a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_about import about_run, watched
from benchmarks.gpu_attention import MATRIX_RATE, Step
from benchmarks.gpu_by_hand import NUM_LAYERS
from benchmarks.gpu_promises import OVER_BOUND
from benchmarks.gpu_shapes import KNOWN, PAGE_SIZE
from benchmarks.gpu_timing import copy_rate, device_us
from seqattn.attention.calls import Choice
from seqattn.packed import FlashInferHybridData, HybridLevel

#: 32 query and 8 KV heads of 128 in bfloat16, prompts and documents in one piece, as in the table of promises
AS_PROMISED = argparse.Namespace(
    heads=[32, 8, 128], dtype="bfloat16", seed=0, scattered=False, ragged=False, uneven=False, mixed=False
)
ROUNDS, WARM_UPS = 3, 30
#: seconds
PAUSE_S, HOT_S = 0.1, 1.5

#: each by its name
Ways = dict[str, AbstractContextManager[object]]


def nothing(*_: object, **__: object) -> None:
    """In the place of something that is left out."""


def share_us(level: HybridLevel, step: Step, copy: float, *, is_last: bool) -> tuple[float, float]:
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


def planned(step: Step, data: FlashInferHybridData) -> list[Choice]:
    """The kernel of each level as it is planned, and its slices; all lists of a level are of one length here."""
    choices = []
    for call, level in zip(step.attention._prepared.work.calls, data.levels, strict=True):
        slices, rest = divmod(len(call.kv_last_page_len), len(level.qo_indptr) - 1)
        assert not rest, "as many lists for each group"
        choices.append(Choice(call.kernel, slices))
    return choices


@contextmanager
def chosen(step: Step, data: FlashInferHybridData, level: int, choice: Choice) -> Iterator[None]:
    """The step with one level computed in another way."""
    choices = planned(step, data)
    choices[level] = choice
    step.choose(data, choices)
    try:
        yield
    finally:
        step.attention.plan(data)


def parts(step: Step, data: FlashInferHybridData) -> Ways:
    """The planned step, and parts of it; each can be entered once."""
    impl: Any = step.attention._impl
    run_call, num_levels = impl._run_call, len(data.levels)

    def only(i: int) -> Callable[..., None]:
        return lambda q, layer, prepared, _: run_call(q, layer, prepared, i)

    return {
        "ours": nullcontext(),
        "in turn": patch.multiple(impl, overlap=False),
        **{f"level {i} alone": patch.multiple(impl, _run_parts=only(i)) for i in range(num_levels)},
        "around": patch.multiple(impl, _run_call=nothing),
        "without gathering": patch.multiple(impl._launcher, gather_queries=nothing),
        "without merging": patch.multiple(impl._launcher, merge_parts=nothing),
    }


def merge_behind_first(impl: Any) -> Callable[..., None]:  # noqa: ANN401  the backend, or what stands for it
    """A merge on the stream of the first level, when all levels are done."""
    merge_parts, first = impl._launcher.merge_parts, impl._streams._sides[0]

    def merge(*parts: object, **options: object) -> None:
        main = torch.cuda.current_stream()
        first.wait_stream(main)
        with torch.cuda.stream(first):
            merge_parts(*parts, **options)
        main.wait_stream(first)

    return merge


@contextmanager
def together(*ways: AbstractContextManager[object]) -> Iterator[None]:
    """All of them at once."""
    with ExitStack() as stack:
        for way in ways:
            stack.enter_context(way)
        yield


def tried(step: Step, data: FlashInferHybridData) -> Ways:
    """The step in other ways."""
    from benchmarks.gpu_early import gathering_early, merging_early

    impl: Any = step.attention._impl
    streams, run_call, last = impl._streams, impl._run_call, len(data.levels) - 1

    def in_reverse(q: object, layer: int, prepared: object, i: int) -> None:
        run_call(q, layer, prepared, last - i)

    by_fa2 = [i for i, choice in enumerate(planned(step, data)) if choice.kernel == "fa2"]
    return {
        "begun at once": patch.multiple(streams, _pause=SimpleNamespace(zero_=nothing)),
        "one priority": patch.multiple(streams, _sides=[torch.cuda.Stream() for _ in streams._sides]),  # type: ignore[no-untyped-call]
        "last level first": patch.multiple(impl, _run_call=in_reverse),
        "gathering early": gathering_early(),
        "merging early": merging_early(),
        "both early": together(gathering_early(), merging_early()),
        "merging early behind level 0": together(
            merging_early(), patch.multiple(impl._launcher, merge_parts=merge_behind_first(impl))
        ),
        **{f"level 0: fa3x{n}": chosen(step, data, 0, Choice("fa3", n)) for n in range(1, 9)},
        **{f"level {i}: fa3x{n}": chosen(step, data, i, Choice("fa3", n)) for i in by_fa2 for n in (1, 2)},
    }


def rested_us(layers: Callable[[], object]) -> float:
    """Microseconds a layer, after a pause."""
    time.sleep(PAUSE_S)
    return device_us(layers, NUM_LAYERS, WARM_UPS)[0]


def hot(layers: Callable[[], object], us: float) -> dict[str, float | None]:
    """What a layer takes in the end, if it runs for `HOT_S` seconds; and the device until then.

    Args:
        layers: launches the kernels.
        us: microseconds of a layer at rest.

    Returns:
        Microseconds, the lowest clock in MHz and the most power in watts; None for what nvidia-smi does not say.
    """
    with watched("clocks.sm,power.draw") as seen:
        hot_us, _ = device_us(layers, NUM_LAYERS, warm_ups=int(HOT_S / (us * NUM_LAYERS * 1e-6)))
    clocks, watts = zip(*seen, strict=True) if seen else ([None], [None])
    return {"hot_us": hot_us, "hot_mhz": min(clocks), "hot_watts": max(watts)}


def measure(step: Step, copy: float) -> dict[str, Any]:
    """One shape, and its parts."""
    data = step.packed(step.cost_model)
    step.attention.plan(data)
    step.layers()
    impl: Any = step.attention._impl
    row: dict[str, Any] = {"shape": list(step.shape), "name": str(step.shape)}
    row["bound_us"] = round(step.work_us({"copy": copy}), 1)
    calls = step.attention._prepared.work.calls
    row["levels"] = []
    for i, (call, level) in enumerate(zip(calls, data.levels, strict=True)):
        pages, matrix = share_us(level, step, copy, is_last=i == len(calls) - 1)
        kernel = f"{call.kind[0]}:{len(call.kv_last_page_len)}"
        row["levels"].append({"kernel": kernel, "pages_us": round(pages, 1), "matrix_us": round(matrix, 1)})
    row["planned"] = [f"level {i}: {choice.kernel}x{choice.slices}" for i, choice in enumerate(planned(step, data))]
    row |= {"parts": {}, "tried": {}}
    replays = []
    for _ in range(ROUNDS):
        replays.append(rested_us(impl._streams._pause.zero_))
        for times, ways in ((row["parts"], parts(step, data)), (row["tried"], tried(step, data))):
            for name, way in ways.items():
                with way:
                    times.setdefault(name, []).append(rested_us(step.layers))
    row["replay_us"] = statistics.median(replays)
    return row | hot(step.layers, row["parts"]["ours"][0])


def line_of(row: dict[str, Any]) -> str:
    """A row in words."""
    levels = "  ".join(
        f"{level['kernel']} (pages {level['pages_us']}, matrix {level['matrix_us']})" for level in row["levels"]
    )
    times = "  ".join(f"{name} {statistics.median(times)}" for name, times in (row["parts"] | row["tried"]).items())
    return f"{row['name']:34} bound {row['bound_us']:6}  hot {row['hot_us']}  {levels}  {times}"


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
