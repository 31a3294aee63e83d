"""Measuring a device: the fit finds planted constants, and the command line says what is missing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve

from seqattn import __main__ as command_line
from seqattn.attention import fa3_sources
from seqattn.attention.plan import plan_batch
from seqattn.cache import PagedKVCacheManager
from seqattn.calibrate import CalibrationBatch, Shape, calibrate, calibration_shapes, lasting, measure
from seqattn.constants import Chip, load_constants, path_of, save_constants, scaled
from seqattn.cuda_steps import CudaSteps
from seqattn.device import Device, Heads
from seqattn.errors import BadValueError, TensorError
from seqattn.fit import Measured, fit_device, predict
from seqattn.hybrid import pack_runs

HEADS = Heads()
BEGIN = Device(num_processors=108)
#: a device unlike the one that the fit begins with
PLANTED = evolve(
    BEGIN,
    plain_us=12.0,
    start_us=14.0,
    decode=evolve(BEGIN.decode, bytes_per_s=2.0e12),
    fa2_128=evolve(BEGIN.fa2_128, token_ns=35.0),
    fa3=evolve(BEGIN.fa3, token_ns=21.0),
)


class FakeDevice:
    """A timer that computes with planted constants, and shakes a little."""

    def __init__(self, noise: float) -> None:
        self.noise = noise
        self.rng = np.random.default_rng(0)

    def __call__(self, batch: CalibrationBatch, kept: Sequence[bool], slices: Sequence[int]) -> float:
        (us,) = predict([Measured(0, batch.levels(kept), slices, 1.0)], HEADS, PLANTED)
        return float(us * np.exp(self.rng.normal(0, self.noise)))


def measured(noise: float, count: int = 24, **options: object) -> list[Measured]:
    shapes = calibration_shapes(count, 1 << 17)
    return measure(shapes, FakeDevice(noise), **({"has_fa3": True} | options))  # type: ignore[arg-type]


def test_the_fit_finds_planted_constants() -> None:
    found = calibrate(measured(0.01), HEADS, BEGIN)
    assert found.decode.bytes_per_s == pytest.approx(2.0e12, rel=0.1)
    assert found.fa3.token_ns == pytest.approx(21.0, rel=0.1)
    assert found.fa2_128.token_ns == pytest.approx(35.0, rel=0.1)
    assert found.plain_us == pytest.approx(12.0, rel=0.15)
    unseen = measure(calibration_shapes(8, 1 << 17, seed=9), FakeDevice(0.0), has_fa3=True)
    errors = np.abs(np.log(predict(unseen, HEADS, found) / [step.us for step in unseen]))
    before = np.abs(np.log(predict(unseen, HEADS, BEGIN) / [step.us for step in unseen]))
    assert np.median(errors) < 0.02 < np.median(before)


def test_one_disturbed_measurement_does_not_bend_the_rest() -> None:
    steps = measured(0.005)
    steps[5] = Measured(steps[5].batch, steps[5].levels, steps[5].slices, 40 * steps[5].us)
    found = calibrate(steps, HEADS, BEGIN)
    assert found.fa3.token_ns == pytest.approx(21.0, rel=0.15)


def test_measuring_stops_when_time_is_up_but_not_too_early() -> None:
    few = measured(0.0, on_batch=lambda: False)
    assert len({step.batch for step in few}) == 12
    times = itertools.count()
    assert len({step.batch for step in measured(0.0, on_batch=lambda: next(times) < 15)}) == 16


def test_time_is_counted_from_the_end_of_the_first_batch() -> None:
    """Kernels are compiled in it, which may take minutes: all sixty batches are measured after them."""
    times = iter([300.0, 301.0, 349.0, 350.0, 351.0])
    goes_on = lasting(50.0, lambda: next(times))
    assert [goes_on() for _ in range(5)] == [True, True, True, False, False]


def test_too_little_or_senseless_measurements_are_refused() -> None:
    with pytest.raises(BadValueError, match="1 batches"):
        calibrate(measured(0.0, 1), HEADS, BEGIN)
    with pytest.raises(BadValueError, match="positive times"):
        fit_device([], HEADS, BEGIN)
    with pytest.raises(BadValueError, match="positive times"):
        fit_device([Measured(0, measured(0.0, 1)[0].levels, [], float("nan"))], HEADS, BEGIN)
    with pytest.raises(BadValueError, match="free memory"):
        calibration_shapes(1, 100)


def test_shapes_fit_in_memory_and_have_every_kind_of_sharing() -> None:
    shapes = calibration_shapes(40, 1 << 16)
    assert all(shape.num_tokens <= 1 << 16 for shape in shapes)
    assert {shape.systems > 1 for shape in shapes} == {True, False}
    assert {shape.documents > 1 for shape in shapes} == {True, False}
    assert calibration_shapes(40, 1 << 16) == shapes, "the same at every calibration"


def test_a_batch_is_what_its_shape_says() -> None:
    batch = CalibrationBatch(Shape(16, 2, 64, 2, 32, 48))
    assert sorted({int(page) for table in batch.tables for page in table}) == list(
        range((2 * 64 + 4 * 32 + 16 * 48) // 16)
    )
    assert batch.depths == [0, 1, 1, 0, 1, 1]
    for kept, slices in batch.ways(has_fa3=True):
        ones = np.ones_like(batch.lens)
        data = pack_runs(batch.tables, batch.lens, ones, batch.forest, kept, page_size=16)
        assert len(data.levels) == len(slices) + 1 == len(batch.levels(kept))
    names = {(tuple(kept), tuple(slices)) for kept, slices in batch.ways(has_fa3=True)}
    assert len(names) == 1 + 2 * 6 + 25, "plain, each depth alone, and both"
    assert {slices for _, slices in ((k, tuple(s)) for k, s in batch.ways(has_fa3=False))} == {(), (0,), (0, 0)}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "shape", [Shape(8, 1, 64, 1, 0, 48), Shape(16, 1, 64, 2, 32, 48), Shape(16, 2, 64, 2, 32, 48)], ids=str
)
def test_levels_are_in_line_where_their_pages_are(shape: Shape, seed: int) -> None:
    batch = CalibrationBatch(shape, seed=seed)
    manager = PagedKVCacheManager(shape.num_tokens // 16, 16, 1, 8, torch.float32, "cpu")
    found = []
    for kept, _ in batch.ways(has_fa3=False):
        data = pack_runs(batch.tables, batch.lens, np.ones_like(batch.lens), batch.forest, kept, page_size=16)
        shared = plan_batch(manager, data, None, causal=True).levels[:-1]
        assert [level.in_line for level in batch.levels(kept)[:-1]] == [level.in_line for level in shared]
        found += [level.in_line for level in shared]
    assert any(found) == (seed == 1 and shape.systems == 1)


# -- the command line --------------------------------------------------------------------------------------------------

Output = pytest.CaptureFixture[str]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["seqattn", "calibrate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    return int(stopped.value.code or 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    assert run(monkeypatch) == 2
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(TensorError, match="no CUDA device"):
        CudaSteps(HEADS, torch.device("cuda"))


CHIP = Chip("NVIDIA Some GPU", 108, has_fa3=True)


@pytest.fixture
def with_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A command line that finds a device, which computes with planted constants."""
    monkeypatch.setenv("SEQATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(command_line, "_chip", lambda _number: CHIP)
    monkeypatch.setattr(command_line, "find_spec", lambda name: name)
    monkeypatch.setattr(fa3_sources, "why_fa3_cannot_be_used", lambda: None)
    monkeypatch.delenv("SEQATTN_FA3", raising=False)
    monkeypatch.setattr(command_line, "_measured", lambda *_, has_fa3: measured(0.01, 12, has_fa3=has_fa3))
    return path_of(CHIP.name)


def test_constants_are_measured_saved_and_shown(
    monkeypatch: pytest.MonkeyPatch, with_a_device: Path, capsys: Output
) -> None:
    assert run(monkeypatch, "--show") == 0
    assert "for lack of a file" in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "fa3 token_ns" in out
    assert "off at the median" in out
    found = load_constants(with_a_device, CHIP)
    assert found.fa3.token_ns == pytest.approx(21.0, rel=0.15)
    assert run(monkeypatch, "--show") == 0
    assert f"{found.fa3.token_ns:.4g}" in capsys.readouterr().out


def test_fa3_that_is_turned_off_is_neither_measured_nor_used(
    monkeypatch: pytest.MonkeyPatch, with_a_device: Path, capsys: Output
) -> None:
    for word, reason, why in (("off", None, "it is turned off in the environment"), ("", "no compiler", "no compiler")):
        monkeypatch.setenv("SEQATTN_FA3", word)
        monkeypatch.setattr(fa3_sources, "why_fa3_cannot_be_used", lambda: reason)  # noqa: B023  called at once
        assert run(monkeypatch) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert f"fa3 is not measured: {why}; these constants will not use it" in said
        found = load_constants(with_a_device, CHIP)
        assert not found.has_fa3
        assert found.fa3.token_ns == pytest.approx(scaled(CHIP).fa3.token_ns), "as it was"


def test_another_file_can_be_written_and_shown(
    monkeypatch: pytest.MonkeyPatch, with_a_device: Path, tmp_path: Path, capsys: Output
) -> None:
    other = tmp_path / "here" / "mine.json"
    assert run(monkeypatch, "--out", other) == 0
    assert other.is_file()
    assert not with_a_device.exists()
    assert run(monkeypatch, "--show", "--out", other) == 0
    assert "mine.json" in "".join(capsys.readouterr().out.split())
    other.write_text("{")
    assert run(monkeypatch, "--show", "--out", other) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_flashinfer_must_be_there(monkeypatch: pytest.MonkeyPatch, with_a_device: Path, capsys: Output) -> None:
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    assert run(monkeypatch) == 2
    assert "seqattn[flashinfer]" in capsys.readouterr().err
    assert not with_a_device.exists()


def test_a_saved_file_can_be_read_by_people(tmp_path: Path) -> None:
    save_constants(tmp_path / "a.json", Device(), CHIP, version="0.7.2")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["device"] == CHIP.name
    assert found["constants"]["decode"]["bytes_per_s"] == Device().decode.bytes_per_s


@pytest.mark.usefixtures("with_a_device")
def test_without_a_home_it_says_what_names_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SEQATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    for arguments in ([], ["--show"]):
        assert run(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert "Could not determine home directory" in error
        assert "set SEQATTN_CACHE_DIR, or name a file with --out" in error
    assert run(monkeypatch, "--out", tmp_path / "mine.json") == 0
