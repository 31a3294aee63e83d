"""The constants of `seqattn.device` for the device at hand: measured, shipped, or guessed.

`python -m seqattn calibrate` measures them and writes a file for each device and version of flashinfer:

    $SEQATTN_CACHE_DIR, or $XDG_CACHE_HOME/seqattn, or ~/.cache/seqattn
    └── constants-nvidia-h200-0.7.2.json

Without a file, an H200 has the constants that come with this package; any other device has those of an H200 in
proportion to its memory's rate and its clock, which is no more than a start.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict, define, evolve, fields

from seqattn.device import Device, KernelCost
from seqattn.errors import BadValueError, ConstantsError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Chip", "constants_for", "load_constants", "path_of", "save_constants", "scaled"]

_FORMAT = 4
_NAMES = {field.name for field in fields(Device) if field.init}
_AGAIN = "run `python -m seqattn calibrate` again"
_KERNELS = ("decode", "fa2_64", "fa2_128", "fa3", "short", "fa3_in_line")
#: of the H200 that the defaults were measured on: bytes a second by its data sheet's clocks, and kHz
_H200_RATE, _H200_CLOCK = 4.917e12, 1_980_000


@define(slots=True, frozen=True)
class Chip:
    """What is known of a device without measuring.

    Attributes:
        name: as CUDA calls it.
        num_processors: multiprocessors.
        has_fa3: whether it runs fa3.
        bytes_per_s: its memory's rate; None if unknown.
        clock_khz: of its multiprocessors; None if unknown.
    """

    name: str
    num_processors: int
    has_fa3: bool
    bytes_per_s: float | None = None
    clock_khz: float | None = None

    @classmethod
    def of(cls, properties: object) -> Chip:
        """From `torch.cuda.get_device_properties`; older versions of torch say less."""
        found: dict[str, Any] = {name: getattr(properties, name, None) for name in _PROPERTIES}
        rate = None
        if found["memory_clock_rate"] and found["memory_bus_width"]:
            rate = 2e3 * found["memory_clock_rate"] * found["memory_bus_width"] / 8
        has_fa3 = found["major"] == 9
        return cls(found["name"], found["multi_processor_count"], has_fa3, rate, found["clock_rate"] or None)


_PROPERTIES = ("name", "multi_processor_count", "major", "memory_clock_rate", "memory_bus_width", "clock_rate")


def constants_for(chip: Chip, *, version: str | None = None, environ: Mapping[str, str] | None = None) -> Device:
    """The constants to use for a device; a file that cannot be used is warned of and left aside.

    Args:
        chip: the device.
        version: of flashinfer; None for the installed one.
        environ: environment variables that say where files are; None for the process's.
    """
    try:
        path = path_of(chip.name, version=version, environ=environ)
        if path.is_file():
            return load_constants(path, chip, version=version)
    except (ConstantsError, OSError, RuntimeError) as error:  # also a folder that may not be read, or no home
        warnings.warn(f"measured constants are not used: {error}", RuntimeWarning, stacklevel=2)
    return scaled(chip)


def scaled(chip: Chip) -> Device:
    """The shipped constants, in proportion to what is known of another device."""
    device = Device(num_processors=chip.num_processors, has_fa3=chip.has_fa3)
    rate = chip.bytes_per_s / _H200_RATE if chip.bytes_per_s else chip.num_processors / Device().num_processors
    speed = chip.clock_khz / _H200_CLOCK if chip.clock_khz else 1.0
    if 0.97 < rate < 1.03 and 0.97 < speed < 1.03:
        return device
    kernels: dict[str, Any] = {name: _scaled_kernel(getattr(device, name), rate, speed) for name in _KERNELS}
    return evolve(device, **kernels)


def _scaled_kernel(cost: KernelCost, rate: float, speed: float) -> KernelCost:
    return evolve(
        cost,
        wave_us=cost.wave_us / speed,
        token_ns=cost.token_ns / speed,
        bytes_per_s=cost.bytes_per_s * rate,
        reread_bytes_per_s=cost.reread_bytes_per_s * speed,
    )


def path_of(name: str, *, version: str | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The file of a device's constants for a version of flashinfer, which need not exist.

    Raises:
        ConstantsError: no variable names a folder, and there is no home.
    """
    environ = os.environ if environ is None else environ
    folder = environ.get("SEQATTN_CACHE_DIR")
    if not folder:
        folder = f"{environ.get('XDG_CACHE_HOME') or _home() / '.cache'}/seqattn"
    plain = re.sub(r"[^a-z0-9.]+", "-", f"{name}-{_version(version)}".lower())
    return Path(folder) / f"constants-{plain}.json"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise ConstantsError(
            f"there is no folder for constants ({error}): set SEQATTN_CACHE_DIR, or name a file with --out"
        ) from error


def save_constants(path: Path, device: Device, chip: Chip, *, version: str | None = None) -> None:
    """Writes a file; one that is there is replaced whole. Raises ConstantsError if it cannot be written."""
    constants = asdict(device, filter=lambda attribute, _: attribute.init)
    text = {"format": _FORMAT, "device": chip.name, "flashinfer": _version(version), "constants": constants}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ConstantsError(
            f"{path} cannot be written ({error}): name another file, or set SEQATTN_CACHE_DIR"
        ) from error


def load_constants(path: Path, chip: Chip | None = None, *, version: str | None = None) -> Device:
    """Reads a file.

    Args:
        path: the file.
        chip: the device that it must be for; None for any.
        version: of flashinfer, which it must be for; None for the installed one.

    Raises:
        ConstantsError: it cannot be read, is of another format, device or version, or holds a number that makes no
            sense.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConstantsError(f"{path} cannot be read ({error}): {_AGAIN}") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        form = found.get("format") if isinstance(found, dict) else None
        raise ConstantsError(f"{path} has format {form!r}, not {_FORMAT}: {_AGAIN}")
    for key, wanted in (("device", None if chip is None else chip.name), ("flashinfer", _version(version))):
        if wanted is not None and found.get(key) != wanted:
            raise ConstantsError(f"{path} is for {key} {found.get(key)!r}, not {wanted!r}: {_AGAIN}")
    device = _device(path, found.get("constants"))
    if chip is not None and (device.num_processors != chip.num_processors or (device.has_fa3 and not chip.has_fa3)):
        has_fa3 = "with" if device.has_fa3 else "without"
        raise ConstantsError(
            f"{path} is for {device.num_processors} multiprocessors {has_fa3} fa3, not {chip}: {_AGAIN}"
        )
    return device


def _device(path: Path, constants: object) -> Device:
    try:
        if not isinstance(constants, dict) or set(constants) != _NAMES:
            raise TypeError(f"constants {sorted(constants) if isinstance(constants, dict) else constants!r}")
        kernels = {name: KernelCost(**constants[name]) for name in _KERNELS}
        processors = constants["num_processors"]
        if not isinstance(processors, int) or processors < 1 or not isinstance(constants["has_fa3"], bool):
            raise TypeError(f"{processors!r} multiprocessors, has_fa3 {constants['has_fa3']!r}")
        return Device(**(constants | kernels))
    except (TypeError, BadValueError) as error:
        raise ConstantsError(f"{path} holds constants that make no sense ({error}): {_AGAIN}") from error


def _version(version: str | None) -> str:
    """The installed version of flashinfer without what a build adds to it, or "none"."""
    if version is None:
        try:
            version = metadata.version("flashinfer-python")
        except metadata.PackageNotFoundError:
            return "none"
    return ".".join(re.findall(r"\d+", version)[:3])
