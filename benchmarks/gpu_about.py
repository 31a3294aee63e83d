"""What a GPU benchmark ran on, and the command that started it: the head of its rows."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import machine

__all__ = ["about_run", "watched"]


def about_run() -> dict[str, Any]:
    """Device, versions, driver, clocks, processor and command of this process; None for what cannot be found out."""
    flashinfer = None
    with suppress(PackageNotFoundError):
        flashinfer = version("flashinfer-python")
    is_cuda = torch.cuda.is_available()
    driver, clocks = _driver_and_clocks() if is_cuda else (None, None)
    return {
        "device": torch.cuda.get_device_name() if is_cuda else "CPU",
        "torch": torch.__version__,
        "flashinfer": flashinfer,
        "driver": driver,
        "clocks MHz, SM and memory": clocks,
        "machine": machine(),
        "command": _command(),
    }


@contextmanager
def watched(query: str, every_ms: int = 50) -> Iterator[list[list[float]]]:
    """Numbers that nvidia-smi tells of the current device meanwhile, a list each time.

    Args:
        query: their names, as `--query-gpu` takes them.
        every_ms: milliseconds from one to the next.

    Yields:
        A list that is filled in the end; it stays empty where nvidia-smi is absent or says nothing of the device.
    """
    seen: list[list[float]] = []
    process = _watching(query, every_ms)
    try:
        yield seen
    finally:
        if process is not None:
            process.kill()
            *lines, _ = process.communicate()[0].split("\n")  # the last one may be cut off
            seen.extend(numbers for numbers in map(_numbers, lines) if numbers)


def _watching(query: str, every_ms: int) -> subprocess.Popen[str] | None:
    """An nvidia-smi that has told numbers once and goes on; None where there is none."""
    for device in _names():
        command = [*_asking(query, device), f"--loop-ms={every_ms}"]
        with suppress(OSError):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert process.stdout is not None
            if _numbers(process.stdout.readline()):
                return process
            process.kill()
            process.communicate()
    return None


def _numbers(line: str) -> list[float]:
    """Of a line of nvidia-smi; none if it has anything else, as an error has."""
    try:
        return [float(word) for word in line.split(", ")]
    except ValueError:
        return []


def _asking(query: str, device: str) -> list[str]:
    """The command that asks nvidia-smi for these of a device."""
    return ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={device}"]


def _names() -> list[str]:
    """What nvidia-smi may call the current device."""
    number = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(number), "uuid", None)
    # torch counts the devices that this process may see, nvidia-smi all there are.
    return [str(number)] if uuid is None else [f"GPU-{uuid}", str(number)]


def _driver_and_clocks() -> tuple[str | None, list[int] | None]:
    """Of the current device; None for both where nvidia-smi is absent or says nothing of it."""
    for device in _names():
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            command = _asking("driver_version,clocks.max.sm,clocks.max.mem", device)
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            driver, sm, memory = done.stdout.strip().split(", ")
            return driver, [int(sm), int(memory)]
    return None, None


def _command() -> str:
    """The command as it was typed, without paths of this machine: DIR for `--out`, of any other its last part."""
    module, *given = sys.argv
    words = ["python", "-m", f"benchmarks.{Path(module).stem}"]
    for before, word in zip(("", *given), given, strict=False):
        if before == "--out":
            words.append("DIR")
        elif word.startswith("--out="):
            words.append("--out=DIR")
        else:
            words.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(words)
