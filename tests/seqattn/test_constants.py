"""Where a device's constants come from: its file, the package, or a guess."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from attrs import evolve

from seqattn.constants import Chip, constants_for, load_constants, path_of, save_constants, scaled
from seqattn.device import Device
from seqattn.errors import ConstantsError

CHIP = Chip("NVIDIA Some GPU", 108, has_fa3=False, bytes_per_s=2.0e12, clock_khz=1_410_000)
DEVICE = Device(num_processors=108, has_fa3=False, plain_us=12.5)
#: as the tests set it
VERSION = "0.7.2.post1"


def saved(folder: Path) -> tuple[Path, dict[str, str]]:
    environ = {"SEQATTN_CACHE_DIR": str(folder)}
    path = path_of(CHIP.name, version=VERSION, environ=environ)
    save_constants(path, DEVICE, CHIP, version=VERSION)
    return path, environ


def test_saved_constants_are_used_from_then_on(tmp_path: Path) -> None:
    path, environ = saved(tmp_path / "new" / "folder")
    assert path.name == "constants-nvidia-some-gpu-0.7.2.json"
    assert load_constants(path, CHIP, version=VERSION) == DEVICE
    assert constants_for(CHIP, version=VERSION, environ=environ) == DEVICE
    assert [found.name for found in path.parent.iterdir()] == [path.name], "nothing is left of writing it"


def test_a_file_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConstantsError, match=r"cannot be written .* name another file, or set SEQATTN_CACHE_DIR"):
        save_constants(tmp_path / "file" / "constants.json", DEVICE, CHIP, version=VERSION)


def test_the_folder_is_the_one_that_the_environment_names(tmp_path: Path) -> None:
    name = "constants-a-1.2.json"
    assert path_of("A", version="1.2", environ={"SEQATTN_CACHE_DIR": str(tmp_path)}) == tmp_path / name
    assert path_of("A", version="1.2", environ={"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "seqattn" / name
    assert path_of("A", version="1.2", environ={}) == Path.home() / ".cache" / "seqattn" / name
    assert "none" in path_of("A", environ={}).name or "0." in path_of("A", environ={}).name


def test_constants_of_another_version_are_not_used(tmp_path: Path) -> None:
    path, environ = saved(tmp_path)
    assert constants_for(CHIP, version="0.8.0", environ=environ) == scaled(CHIP)
    with pytest.raises(ConstantsError, match=r"flashinfer '0\.7\.2', not '0\.8\.0'.*calibrate"):
        load_constants(path, CHIP, version="0.8.0")


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1, not 4"),
        ({"device": "Another"}, "for device 'Another'"),
        ({"constants": None}, "make no sense"),
        ({"constants": {"plain_us": 1.0}}, "make no sense"),
    ],
)
def test_a_file_that_does_not_fit_is_warned_of_and_left_aside(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path, environ = saved(tmp_path)
    change(path, **changes)
    with pytest.raises(ConstantsError, match=message):
        load_constants(path, CHIP, version=VERSION)
    with pytest.warns(RuntimeWarning, match=message):
        assert constants_for(CHIP, version=VERSION, environ=environ) == scaled(CHIP)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("pathlib.Path.is_file", PermissionError("not yours")),
        ("seqattn.constants.path_of", RuntimeError("Could not determine home directory")),
    ],
    ids=["a folder that is closed", "no home"],
)
def test_a_folder_that_cannot_be_looked_at_is_left_aside(
    where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(where, refuse)
    with pytest.warns(RuntimeWarning, match=str(error)):
        assert constants_for(CHIP) == scaled(CHIP)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("plain_us", -1.0),
        ("num_processors", 0),
        ("has_fa3", 1),
        ("has_short", 1),
        ("decode", {"wave_us": 1.0}),
        ("margin", "x"),
    ],
)
def test_a_number_in_a_file_that_makes_no_sense_is_refused(tmp_path: Path, name: str, value: object) -> None:
    path, _ = saved(tmp_path)
    change(path, constants=json.loads(path.read_text())["constants"] | {name: value})
    with pytest.raises(ConstantsError, match="make no sense"):
        load_constants(path, version=VERSION)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    path, environ = saved(tmp_path)
    path.write_text(text)
    with pytest.raises(ConstantsError, match="calibrate"):
        load_constants(path, CHIP, version=VERSION)
    with pytest.warns(RuntimeWarning):
        constants_for(CHIP, version=VERSION, environ=environ)


def test_constants_without_fa3_serve_a_device_that_has_it_and_not_the_other_way_round(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    assert not load_constants(path, evolve(CHIP, has_fa3=True), version=VERSION).has_fa3
    change(path, constants=json.loads(path.read_text())["constants"] | {"has_fa3": True})
    with pytest.raises(ConstantsError, match="for 108 multiprocessors with fa3, not Chip"):
        load_constants(path, CHIP, version=VERSION)


def test_constants_of_another_device_of_that_name_are_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    with pytest.raises(ConstantsError, match="108 multiprocessors"):
        load_constants(path, evolve(CHIP, num_processors=66), version=VERSION)


def test_without_a_file_an_h200_is_as_measured_and_others_are_in_proportion(tmp_path: Path) -> None:
    environ = {"SEQATTN_CACHE_DIR": str(tmp_path)}
    properties = SimpleNamespace(
        name="NVIDIA H200",
        multi_processor_count=132,
        major=9,
        memory_clock_rate=3_201_000,
        memory_bus_width=6144,
        clock_rate=1_980_000,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert constants_for(Chip.of(properties), version=VERSION, environ=environ) == Device()
    device, h200 = scaled(CHIP), Device()
    assert (device.num_processors, device.has_fa3) == (108, False)
    assert device.decode.bytes_per_s == pytest.approx(h200.decode.bytes_per_s * 2.0 / 4.917, rel=0.01)
    assert device.decode.token_ns > h200.decode.token_ns
    little = scaled(Chip.of(SimpleNamespace(name="Old", multi_processor_count=66, major=7)))
    assert little.decode.bytes_per_s == pytest.approx(h200.decode.bytes_per_s / 2), (
        "by multiprocessors, for lack of more"
    )
