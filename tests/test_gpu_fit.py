"""The fit of the shipped constants: it reads what was recorded, predicts as the planner does, and finds better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve, fields

from benchmarks import gpu_calibration, gpu_fit
from benchmarks.gpu_calibration import measured_in
from benchmarks.gpu_fit import Batches, TensorDevice, batches_of, fitted, report
from benchmarks.gpu_recorded import RESULTS
from seqattn.calibrate import CalibrationBatch, calibration_shapes
from seqattn.device import Device, KernelCost
from seqattn.fit import NAMES, Measured, device_with, logs_of, predict
from seqattn.load import Heads

#: of a kernel's cost
KERNEL_NUMBERS = fields(KernelCost)
CALIBRATION = RESULTS / "gpu_calibration_h200_8_1.jsonl"


def planted(count: int, device: Device) -> list[Measured]:
    """Batches whose times are those of a device."""
    steps: list[Measured] = []
    for number, shape in enumerate(calibration_shapes(count, 1 << 16, seed=5)):
        batch = CalibrationBatch(shape, seed=number)
        ways = [Measured(number, batch.levels(kept), its, 1.0) for kept, its in batch.ways(has_fa3=True)]
        times = predict(ways, Heads(), device)
        steps += [evolve(step, us=us) for step, us in zip(ways, times.tolist(), strict=True)]
    return steps


def as_batches(steps: list[Measured]) -> Batches:
    return Batches("planted", steps, Heads(), [1.0] * (1 + steps[-1].batch))


def test_what_calibrate_measured_is_read_back() -> None:
    heads, steps = measured_in(CALIBRATION)
    assert (heads, len(steps)) == (Heads(8, 1, 128), 1024)
    plain = [step for step in steps if len(step.levels) == 1]
    assert [step.batch for step in plain] == list(range(40)), "one for each batch"
    first = json.loads(CALIBRATION.read_text(encoding="utf-8").splitlines()[1])
    assert [step.us for step in steps if step.batch == 0] == first["us"]
    assert int(plain[0].levels[0].rows.sum()) == first["shape"][0]


def test_a_row_without_a_time_for_every_way_is_refused(tmp_path: Path) -> None:
    head, first, *_ = CALIBRATION.read_text(encoding="utf-8").splitlines()
    row = json.loads(first)
    (tmp_path / "calibration.jsonl").write_text(
        f"{head}\n{json.dumps(row | {'us': row['us'][:-1]})}\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match="shorter"):
        measured_in(tmp_path / "calibration.jsonl")


@pytest.mark.parametrize("has_fa3", [True, False])
def test_rows_are_written_as_they_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, has_fa3: bool) -> None:
    class Timer:
        def __init__(self, *_: object) -> None:
            self.times = 0

        def most_tokens(self) -> int:
            return 1 << 14

        def __call__(self, *_: object) -> float:
            self.times += 1
            return float(self.times)

    monkeypatch.setattr(gpu_calibration, "CudaSteps", Timer)
    monkeypatch.setattr(gpu_calibration, "_can_run_fa3", lambda: has_fa3)
    monkeypatch.setattr(
        "sys.argv", ["gpu_calibration", "--out", str(tmp_path), "--shapes", "3", "--heads", "8", "2", "64"]
    )
    gpu_calibration.main()
    heads, steps = measured_in(tmp_path / "calibration.jsonl")
    assert heads == Heads(8, 2, 64)
    assert [step.us for step in steps] == [float(n) for n in range(1, len(steps) + 1)]
    assert steps[-1].batch == 2
    assert any(any(step.slices) for step in steps) is has_fa3


@pytest.mark.parametrize("name", ["", "_uneven", "_8_1"])
def test_predictions_with_gradients_are_those_of_the_planner(name: str) -> None:
    device = Device()
    for its in batches_of(name):
        logs = torch.as_tensor(logs_of(device)).requires_grad_()
        us = its.predict(TensorDevice(device, logs))
        us.sum().backward()  # type: ignore[no-untyped-call]
        assert logs.grad is not None
        assert torch.isfinite(logs.grad).all()
        assert torch.isfinite(us).all()
        assert (us > 0).all()
    steps = measured_in(CALIBRATION)[1]
    found = Batches("", steps, Heads(8, 1, 128), [1.0] * 40).predict(
        TensorDevice(device, torch.as_tensor(logs_of(device)))
    )
    np.testing.assert_allclose(found.numpy(), predict(steps, Heads(8, 1, 128), device), rtol=1e-5)


def test_constants_go_to_logarithms_and_back() -> None:
    device = Device()
    same = device_with(device, logs_of(device))
    for owner, name in NAMES:
        one, other = ((getattr(d, owner) if owner else d) for d in (device, same))
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9), (owner, name)


def test_a_choice_that_loses_is_learned_to_be_avoided() -> None:
    """A device on which fa3 costs three times as much: what shipped loses there, what is found does not."""
    truth = evolve(Device(), fa3=evolve(Device().fa3, token_ns=36.0), fa3_in_line=evolve(Device().fa3, token_ns=30.0))
    batches = as_batches(planted(16, truth))
    stages: list[float] = []
    found = fitted(Device(), [batches], on_stage=stages.append)
    lost = [batches.lost(batches.predict(TensorDevice(d, torch.as_tensor(logs_of(d))))) for d in (Device(), found)]
    assert lost[0].mean() > 0.02
    assert lost[1].mean() < 0.2 * lost[0].mean()
    assert len(stages) == 3


def test_constants_that_are_right_stay(capsys: pytest.CaptureFixture[str]) -> None:
    batches = as_batches(planted(8, Device()))
    found = fitted(Device(), [batches])
    assert np.abs(logs_of(found) - logs_of(Device())).max() < 0.2, (
        "a fifth: next to nothing of them can be told from eight batches"
    )
    report(found, [batches])
    assert "0.00% lost in the mean" in capsys.readouterr().out


def test_the_script_says_what_is_lost_and_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def few(without: Any) -> list[Batches]:  # noqa: ANN401  names
        asked.append(tuple(without))
        return [as_batches(planted(6, Device()))]

    monkeypatch.setattr(gpu_fit, "all_batches", few)
    monkeypatch.setattr("sys.argv", ["gpu_fit", "--without", "_seed101"])
    gpu_fit.main()
    said = capsys.readouterr().out
    assert asked == [(), ("_seed101",)]
    assert "the constants that ship with the package" in said
    assert "fitted without _seed101" in said
    words = dict(line.split(" ", 1) for line in said.splitlines() if line)
    assert float(words["level_us"]) == pytest.approx(Device().level_us, rel=0.2)
    assert len(words["fa3_in_line"].split(", ")) == len(KERNEL_NUMBERS)


def test_names_that_are_left_out_are_not_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_fit, "ROWS", ("_ragged", "_8_1"))
    monkeypatch.setattr(gpu_fit, "CALIBRATIONS", ("_8_1",))
    ragged, both = {"_ragged", "_ragged, anywhere"}, {"_8_1", "_8_1, anywhere", "calibration_8_1"}
    assert {its.name for its in gpu_fit.all_batches(())} == ragged | both
    assert {its.name for its in gpu_fit.all_batches(("_8_1", "calibration_8_1"))} == ragged
