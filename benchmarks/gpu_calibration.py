"""What `python -m seqattn calibrate` measures on a GPU, with the time of every way kept.

    python -m benchmarks.gpu_calibration --out DIR [--heads 32 8 128] [--shapes 75] [--seed 0]

Writes a row for each batch to DIR/calibration.jsonl: its shape, the number that its pages were drawn from, and the
microseconds a layer of every way to compute it, in the order of `CalibrationBatch.ways`. `benchmarks.gpu_fit` makes
the constants that ship with the package from such rows and from those of `benchmarks.gpu_attention`. Files of rows
that say "measured by" were written from what `seqattn.calibrate.measure` gave, with the same shapes and seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_about import about_run
from seqattn.attention.fa3_sources import sound_costs
from seqattn.calibrate import CalibrationBatch, Shape, calibration_shapes
from seqattn.constants import Chip, scaled
from seqattn.cuda_steps import CudaSteps
from seqattn.fit import Measured
from seqattn.load import Heads

__all__ = ["measured_in"]


def measured_in(path: Path) -> tuple[Heads, list[Measured]]:
    """The steps of a recorded file, in microseconds a layer, and the heads that they were measured with."""
    about, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    steps: list[Measured] = []
    for number, row in enumerate(rows):
        batch = CalibrationBatch(Shape(*row["shape"]), seed=row["seed"])
        ways = batch.ways(has_fa3=about["has_fa3"])
        steps += [
            Measured(number, batch.levels(kept), slices, us) for (kept, slices), us in zip(ways, row["us"], strict=True)
        ]
    return Heads(*about["heads"]), steps


def measured_rows(timer: CudaSteps, shapes: list[Shape], *, has_fa3: bool) -> Iterator[dict[str, Any]]:
    """The row of each batch; fa3 is measured only where it can be run."""
    for seed, shape in enumerate(shapes):
        batch = CalibrationBatch(shape, seed=seed)
        us = [round(timer(batch, kept, slices), 2) for kept, slices in batch.ways(has_fa3=has_fa3)]
        yield {"shape": list(shape), "seed": seed, "us": us}


def _can_run_fa3() -> bool:
    """Whether the device runs fa3: where it cannot, of which it is warned, fa2 would be measured in its name."""
    return sound_costs(scaled(Chip.of(torch.cuda.get_device_properties(0)))).has_fa3


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128])
    parser.add_argument("--shapes", type=int, default=75)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    timer = CudaSteps(Heads(*options.heads), torch.device("cuda", 0))
    has_fa3 = _can_run_fa3()
    shapes = calibration_shapes(options.shapes, timer.most_tokens(), seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "calibration.jsonl").open("w", encoding="utf-8") as file:
        print(json.dumps(about_run() | {"heads": options.heads, "has_fa3": has_fa3, "seed": options.seed}), file=file)
        for row in measured_rows(timer, shapes, has_fa3=has_fa3):
            print(json.dumps(row), file=file, flush=True)
            print(f"{Shape(*row['shape'])!s:40} plain {row['us'][0]:8} best {min(row['us']):8}", flush=True)


if __name__ == "__main__":
    main()
