"""The planner's constants of an H200, from the steps that were measured on one; runs without a GPU.

    python -m benchmarks.gpu_fit [--without NAME ...]

Prints what choosing by the constants that ship with the package loses, and by the ones that it finds, beginning with
those; then the latter, as `seqattn.device` has them. `--without` leaves rows of these names out ("_seed101", say), to
see how good a choice is where nothing was fitted. It takes four minutes.

A loss is how much longer the way with the least prediction took than the fastest way of its batch. The planner chooses
in two steps, levels as if pages lay anywhere and then kernels by where they lie; so there is a line for each, and what
it loses itself is about that (`tests/seqattn/test_recorded.py` has it exactly).

What is made small, by L-BFGS (Liu and Nocedal 1989; gradients by torch, through the formulas of `seqattn.steps`):

- what a batch loses when each way is taken with a probability that falls with its predicted time; a large loss and one
  to plain attention count more. The probabilities become sharper twice;
- with less weight the errors of the predictions, large ones by their size and not its square;
- with little weight the distance, in orders of magnitude, from where each constant began.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.gpu_calibration import measured_in
from benchmarks.gpu_recorded import RESULTS, RecordedBatch, recorded
from seqattn.device import Device
from seqattn.fit import KERNELS, MOST, NAMES, OF_KERNELS, Measured, Steps, device_with, logs_of
from seqattn.load import FA3, FA3_IN_LINE, Heads, Load
from seqattn.steps import Functions, body_of, times

FloatArray = npt.NDArray[np.float64]

#: rows of gpu_attention in bfloat16, by the ends of their names; and those that `calibrate` measures
ROWS = (
    "", "_ragged", "_scattered", "_seed11", "_seed23", "_seed37", "_seed41", "_seed53", "_seed61", "_seed83",
    "_seed89", "_ragged59", "_uneven", "_uneven71", "_uneven79", "_uneven97", "_seed101", "_uneven103", "_8_1",
)  # fmt: skip
CALIBRATIONS = ("", "_seed1", "_8_1")
#: the promised shapes count more, and one of them, of which nothing else is like, more again
_PROMISED, _ALONE, _MORE = 2.5, "(64, 144, 64)", 4.0
#: relative differences of predicted times that are told apart, one fit after the other; steps of L-BFGS in each
_SHARPER, _NUM_STEPS = (0.03, 0.012, 0.006), 100
#: what errors of predictions weigh beside losses, and from which relative error on they count by their size
_OF_ERRORS, _LARGE = 0.1, 0.05
#: what squares of the logarithms of how far constants have moved weigh
_HELD = 0.002
#: what the square of a loss counts beside it, and what is lost to plain attention beyond the share that is allowed
_SQUARED, _BEHIND_PLAIN, _ALLOWED = 10.0, 3.0, 0.01


def _tensor(value: Any) -> torch.Tensor:  # noqa: ANN401  a number or a tensor
    return torch.as_tensor(value, dtype=torch.float64)


TENSORS = Functions(
    torch.ceil,
    torch.floor,
    lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
    lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
    lambda condition, yes, no: torch.where(condition > 0, _tensor(yes), _tensor(no)),
)


class TensorDevice:
    """What the formulas ask of a `Device`, with gradients of the logarithms of its constants."""

    def __init__(self, begin: Device, logs: torch.Tensor) -> None:
        found = dict(zip(NAMES, torch.exp(logs), strict=True))
        for (owner, name), value in found.items():
            if not owner:
                setattr(self, name, torch.clamp(value, max=MOST.get(name, torch.inf)))
        self.num_processors, self.fa3_waits = begin.num_processors, begin.fa3_waits
        none = _tensor(0.0)
        #: the kernels' numbers, [7, kernels]
        self.table = torch.stack([torch.stack([found.get((k, n), none) for k in KERNELS]) for n in OF_KERNELS])


class Batches:
    """Measured batches as tensors.

    Args:
        name: what to call them.
        steps: their ways; plain is one of each batch's.
        heads: the model's.
        weights: how much each batch counts.

    Attributes:
        us: microseconds a layer that each way took, [ways].
        batch: its batch, [ways].
        losses: how much longer than the fastest way of its batch it took, [ways].
        badness: how bad that is to choose, [ways].
    """

    def __init__(self, name: str, steps: Sequence[Measured], heads: Heads, weights: Sequence[float]) -> None:
        self.name, self.heads, self.weights = name, heads, _tensor(weights)
        loads = Steps(steps, heads, Device())
        self.by_levels = [
            (which, [(torch.as_tensor(load.kernel), _tensor(load.values), _is_fa3(load)) for load in calls])
            for which, calls in loads.by_levels
        ]
        us, self.of_errors = loads.us, _tensor(loads.weights)
        _, batch = np.unique([step.batch for step in steps], return_inverse=True)
        levels = np.array([len(step.levels) - 1 for step in steps])
        best, plain = (np.full(batch.max() + 1, np.inf) for _ in range(2))
        np.minimum.at(best, batch, us)
        np.minimum.at(plain, batch[levels == 0], us[levels == 0])
        self.us, self.batch = _tensor(us), torch.as_tensor(batch)
        self._is_plain, self._after_first = torch.as_tensor(levels == 0), _tensor(np.maximum(levels - 1, 0))
        self.losses = us / best[batch] - 1
        behind = np.maximum(us / plain[batch] - 1 - _ALLOWED, 0)
        self.badness = _tensor(self.losses + _SQUARED * self.losses**2 + _BEHIND_PLAIN * behind)

    def predict(self, device: Any) -> torch.Tensor:  # noqa: ANN401  a `TensorDevice` for a `Device`
        """Microseconds of every way."""
        us = torch.empty(len(self.us), dtype=torch.float64)
        for which, calls in self.by_levels:
            if which:
                us[which] = times(device, [self._body(device, *call) for call in calls], TENSORS)
        return us

    def _body(self, device: Any, kernel: torch.Tensor, values: torch.Tensor, is_fa3: torch.Tensor) -> Any:  # noqa: ANN401
        return body_of(device, device.table[:, kernel], is_fa3, values, self.heads, TENSORS)

    def compared(self, us: torch.Tensor) -> torch.Tensor:
        """What the planner compares: times, with its margins."""
        device: Any = Device()  # of tensors too
        least = device.enough_us(us).clamp(min=0.1)  # what has a logarithm
        return torch.where(self._is_plain, least, us * (1 + device.level_margin) ** self._after_first)

    def lost(self, us: torch.Tensor) -> FloatArray:
        """What each batch loses by the choice that these predictions lead to."""
        order = np.lexsort((self.compared(us).numpy(), self.batch.numpy()))
        batch = self.batch.numpy()[order]
        found: FloatArray = self.losses[order[np.concatenate(([True], batch[1:] != batch[:-1]))]]
        return found

    def objective(self, us: torch.Tensor, sharp: float) -> torch.Tensor:
        """What is to be small, summed over batches."""
        logs = torch.log(self.compared(us))
        nothing = torch.zeros(len(self.weights), dtype=torch.float64)
        least = torch.full_like(nothing, torch.inf).scatter_reduce(0, self.batch, logs.detach(), "amin")
        likely = torch.exp(-(logs - least[self.batch]) / sharp)
        lost = nothing.scatter_add(0, self.batch, likely * self.badness) / nothing.scatter_add(0, self.batch, likely)
        errors = torch.log(us / self.us) / _LARGE
        sizes = self.of_errors * _LARGE * (torch.sqrt(1 + errors**2) - 1)
        return (self.weights * lost).sum() + _OF_ERRORS * sizes.mean() * self.weights.sum()


def _is_fa3(load: Load) -> torch.Tensor:
    return _tensor((load.kernel == FA3) | (load.kernel == FA3_IN_LINE))


def batches_of(name: str) -> list[Batches]:
    """Recorded rows: where their pages are, and once more as if they lay anywhere, which is how levels are chosen."""
    found = [batch for row in recorded(name) if (batch := RecordedBatch(row)).is_as_now]
    weights = [1.0] * len(found)
    if not name:
        weights = [_PROMISED * (_MORE if batch.row["name"] == _ALONE else 1.0) for batch in found]
    heads, in_line = Heads(*found[0].row["heads"]), found[0].row["how"]["in_line"]
    both = [True, False] if in_line else [False]
    return [
        Batches(
            (name or "promised") + ("" if lies or not in_line else ", anywhere"),
            [step for number, batch in enumerate(found) for step in batch.steps(in_line=lies, batch=number)],
            heads,
            [weight / len(both) for weight in weights],
        )
        for lies in both
    ]


def all_batches(without: Sequence[str]) -> list[Batches]:
    """Everything that was measured, but for these names."""
    found = [batches for name in ROWS if name not in without for batches in batches_of(name)]
    for name in CALIBRATIONS:
        if f"calibration{name}" not in without:
            heads, steps = measured_in(RESULTS / f"gpu_calibration_h200{name}.jsonl")
            found.append(Batches(f"calibration{name}", steps, heads, [1.0] * (1 + steps[-1].batch)))
    return found


def fitted(begin: Device, batches: Sequence[Batches], *, on_stage: Callable[[float], None] = lambda _: None) -> Device:
    """The constants by which choosing loses least.

    Args:
        begin: where to begin.
        batches: what was measured.
        on_stage: called after each of the three fits with what was to be made small, as it was at its beginning.

    Cost: O(ways) for each of some 400 evaluations; four minutes for all that is recorded.
    """
    start = _tensor(logs_of(begin))
    logs = start.clone().requires_grad_()
    total = float(sum(its.weights.sum() for its in batches))
    for sharp in _SHARPER:
        optimizer = torch.optim.LBFGS([logs], max_iter=_NUM_STEPS, history_size=20, line_search_fn="strong_wolfe")

        def closure(optimizer: torch.optim.LBFGS = optimizer, sharp: float = sharp) -> torch.Tensor:
            optimizer.zero_grad()
            device = TensorDevice(begin, logs)
            sums = [its.objective(its.predict(device), sharp) for its in batches]
            value = torch.stack(sums).sum() / total + _HELD * ((logs - start) ** 2).sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        on_stage(optimizer.step(closure).item())  # type: ignore[no-untyped-call]
    return device_with(begin, logs.detach().numpy())


def report(device: Device, batches: Sequence[Batches]) -> None:
    """Prints what choosing loses."""
    tensors = TensorDevice(device, _tensor(logs_of(device)))
    for its in batches:
        us = its.predict(tensors)
        lost, off = its.lost(us), torch.median(torch.abs(us / its.us - 1))
        print(
            f"{its.name:20} {len(lost):4} batches: {lost.mean():6.2%} lost in the mean, {lost.max():6.1%} at most, "
            f"{(lost > 0.05).sum():3} over 5 %; predictions {float(off):5.1%} off at the median"
        )


def main() -> None:
    """Runs the fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", nargs="*", default=[])
    without = parser.parse_args().without
    begin, every = Device(), all_batches(())
    print("the constants that ship with the package")
    report(begin, every)
    used = all_batches(without) if without else every
    found = fitted(begin, used, on_stage=lambda value: print(f"fitting from {value:.4f}", flush=True))
    print(f"fitted{' without ' if without else ''}{' '.join(without)}")
    report(found, every)
    for kernel in KERNELS:
        print(kernel, ", ".join(f"{getattr(getattr(found, kernel), name):.4g}" for name in OF_KERNELS))
    for owner, name in NAMES:
        if not owner:
            print(name, f"{getattr(found, name):.4g}")


if __name__ == "__main__":
    main()
