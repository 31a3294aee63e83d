"""From measured steps of attention to the constants of `seqattn.device`; numpy only.

The relative errors of all predictions are made small together, by the method of Levenberg (1944) and Marquardt (1963):
steps of a linear problem, shorter where they do not help. Constants are positive and spread over orders of magnitude,
so their logarithms are looked for. Two things keep the result sane where few measurements say anything:

- each constant is held near where it began, with little weight; `fa3_waits`, which few batches show, stays there;
- large errors weigh less than their square: a measurement that another program disturbed should not bend the rest.

What matters is to tell good ways to compute a batch from better ones, so a way that took much longer than the best of
its batch counts less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import define, evolve

from seqattn.device import Device, Heads
from seqattn.errors import BadValueError
from seqattn.load import Cut, Groups, Load, loads_of
from seqattn.steps import bodies_of, times

if TYPE_CHECKING:
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]

__all__ = [
    "KERNELS",
    "MOST",
    "NAMES",
    "OF_KERNELS",
    "Measured",
    "Steps",
    "device_with",
    "fit_device",
    "logs_of",
    "predict",
]

#: in the order of their numbers in `seqattn.load`; and of a kernel's cost, in the order of `Device.table`
KERNELS = ("decode", "fa2_64", "fa2_128", "fa3", "short", "fa3_in_line")
OF_KERNELS = ("wave_us", "token_ns", "bytes_per_s", "reread_bytes_per_s", "part_ns", "row_ns", "mix")
_OF_DEVICE = (
    "plain_us", "start_us", "level_us", "last_us", "gather_us", "fa2_waits", "spread", "lower_waits", "last_waits",
    "result_ns", "gathered_ns",
)  # fmt: skip
#: fa3 splits nothing
_UNUSED = {(kernel, name) for kernel in ("fa3", "fa3_in_line") for name in ("part_ns", "row_ns")}
#: the constants that are looked for: the kernel or "", and the name
NAMES = (
    *((kernel, name) for kernel in KERNELS for name in OF_KERNELS if (kernel, name) not in _UNUSED),
    *(("", name) for name in _OF_DEVICE),
)
#: what a constant is at most, by its name
MOST = {"spread": 1.0}
#: how much a constant is held near where it began
_HELD = 0.2
#: relative error from which on more counts less
_LARGE = 0.05
_LEAST = 1e-3


@define(slots=True, frozen=True, eq=False)
class Measured:
    """One way to compute a batch, and how long it took.

    Attributes:
        batch: number of the batch.
        levels: its groups, coarsest first, the last level included.
        slices: of each shared level for fa3, 0 for fa2.
        us: microseconds a layer.
    """

    batch: int
    levels: Sequence[Groups]
    slices: Sequence[int]
    us: float


def fit_device(measured: Sequence[Measured], heads: Heads, begin: Device, *, num_steps: int = 60) -> Device:
    """The device whose predictions are nearest to what was measured.

    Args:
        measured: steps of at most two shared levels.
        heads: the model's that they were measured with.
        begin: where to begin, of the right number of multiprocessors.
        num_steps: the most steps to take.

    Raises:
        BadValueError: nothing was measured, or a time is not a positive number.

    Cost: about a second for a thousand measurements.
    """
    if not measured or not all(0 < step.us < float("inf") for step in measured):
        raise BadValueError(f"a fit needs positive times, not {[step.us for step in measured][:10]}")
    steps, start = Steps(measured, heads, begin), logs_of(begin)

    def errors(logs: FloatArray) -> FloatArray:
        relative = np.log(steps.predict(device_with(begin, logs)) / steps.us)
        return np.concatenate((steps.weights * relative, _HELD * (logs - start)))

    return device_with(begin, _least_squares(errors, start, num_steps))


def predict(measured: Sequence[Measured], heads: Heads, device: Device) -> FloatArray:
    """The predicted times of measured steps, in microseconds."""
    return Steps(measured, heads, device).predict(device)


def logs_of(device: Device) -> FloatArray:
    """The logarithms of a device's constants, in the order of `NAMES`."""
    found = [getattr(getattr(device, owner) if owner else device, name) for owner, name in NAMES]
    return np.log(np.maximum(found, _LEAST))


def device_with(begin: Device, logs: FloatArray) -> Device:
    """A device with the constants of these logarithms; what is not in `NAMES` is that of `begin`."""
    found = {
        name: float(min(value, MOST.get(name[1], np.inf))) for name, value in zip(NAMES, np.exp(logs), strict=True)
    }
    changes: dict[str, Any] = {name: value for (owner, name), value in found.items() if not owner}
    for kernel in KERNELS:
        own = {name: value for (owner, name), value in found.items() if owner == kernel}
        changes[kernel] = evolve(getattr(begin, kernel), **own)
    return evolve(begin, **changes)


class Steps:
    """What the calls of measured steps do, those of as many levels together.

    Args:
        measured: steps of at most two shared levels.
        heads: the model's that they were measured with.
        device: the multiprocessors, and which kernels there are.

    Attributes:
        us: what was measured, float64 [steps].
        weights: how much each counts, float64 [steps].
        by_levels: for each number of shared levels, which steps have so many, and what their calls do: coarsest first.
    """

    def __init__(self, measured: Sequence[Measured], heads: Heads, device: Device) -> None:
        self.heads = heads
        self.us = np.array([step.us for step in measured])
        best: dict[int, float] = {}
        for step in measured:
            best[step.batch] = min(best.get(step.batch, step.us), step.us)
        slower = np.array([step.us / best[step.batch] - 1 for step in measured])
        self.weights = np.maximum(np.exp(-np.maximum(slower - 0.05, 0) / 0.6), 0.15)
        self.weights[[len(step.levels) == 1 for step in measured]] = 1.0  # levels must beat it
        self.by_levels: list[tuple[list[int], list[Load]]] = []
        for shared in range(3):
            which = [i for i, step in enumerate(measured) if len(step.levels) == shared + 1]
            loads = [_load(measured[i], heads, device) for i in which]
            calls = [_stacked([load[level] for load in loads]) for level in range(shared + 1)] if loads else []
            self.by_levels.append((which, calls))

    def predict(self, device: Device) -> FloatArray:
        """Microseconds of each step."""
        us = np.empty(len(self.us))
        for which, calls in self.by_levels:
            if which:
                us[which] = times(device, [bodies_of(device, call, self.heads) for call in calls])
        return us


def _load(step: Measured, heads: Heads, device: Device) -> list[Load]:
    slices = np.array(sorted({n for n in step.slices if n} or {1}))
    load, _ = loads_of(Cut.of(step.levels), heads, device.num_processors, slices, has_short=device.has_short)
    ways = [*(1 + slices.tolist().index(n) if n else 0 for n in step.slices), 0]
    return [Load(load.kernel[level, way], load.values[:, level, way]) for level, way in enumerate(ways)]


def _stacked(loads: Sequence[Load]) -> Load:
    return Load(np.array([load.kernel for load in loads]), np.stack([load.values for load in loads], axis=1))


def _least_squares(errors: Callable[[FloatArray], FloatArray], start: FloatArray, num_steps: int) -> FloatArray:
    values, damping, now = start, 1e-2, errors(start)
    for _ in range(num_steps):
        slopes = np.stack([(errors(values + 1e-4 * one) - now) / 1e-4 for one in np.eye(len(values))], axis=1)
        weight = (1 + (now / _LARGE) ** 2) ** -0.5
        normal, towards = (slopes * weight[:, None]).T @ slopes, slopes.T @ (weight * now)
        damped = normal + damping * np.diag(np.diag(normal) + 1e-9)
        tried = values + np.clip(np.linalg.solve(damped, -towards), -0.4, 0.4)
        then = errors(tried)
        if _size(then) < _size(now):
            values, now, damping = tried, then, max(damping / 3, 1e-7)
        elif damping > 1e8:
            break
        else:
            damping *= 5
    return values


def _size(errors: FloatArray) -> float:
    return float(np.sqrt(1 + (errors / _LARGE) ** 2).sum())
