"""What a GPU benchmark ran on, and the command that started it: the head of its rows."""

from __future__ import annotations

import shlex
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["about_run"]

_SMI = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader,nounits")


def about_run() -> dict[str, Any]:
    """Device, versions, driver, clocks and command of this process; None for what cannot be found out."""
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
        "command": _command(),
    }


def _driver_and_clocks() -> tuple[str | None, list[int] | None]:
    """Of the current device; None for both where nvidia-smi is absent or says nothing of it."""
    number = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(number), "uuid", None)
    # torch counts the devices that this process may see, nvidia-smi all there are.
    for device in [str(number)] if uuid is None else [f"GPU-{uuid}", str(number)]:
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            command = [*_SMI, f"--id={device}"]
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
