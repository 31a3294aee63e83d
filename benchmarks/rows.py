"""A row: what one run of one script found, with everything needed to judge it later."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.clock import Sample, microseconds

__all__ = ["Row", "make_row", "row_files"]

Row = dict[str, Any]

_PACKAGES = ("numpy", "torch")


def make_row(script: str, impl: str, options: dict[str, Any], measure: str, sample: Sample, package: str) -> Row:
    """A row of JSON.

    Args:
        script: which benchmark.
        impl: which implementation.
        options: the sizes.
        measure: which of the script's operations.
        sample: what was measured.
        package: the implementation with its version.
    """
    figures: dict[str, float] = (
        microseconds(sample.values) if sample.unit == "ns" else {"median": float(sample.values[0])}
    )
    return {
        "script": script,
        "measure": measure,
        "impl": impl,
        "options": options,
        "unit": "us" if sample.unit == "ns" else sample.unit,
        "n": len(sample.values),
        **{name: float(f"{value:.5g}") for name, value in figures.items()},
        "facts": sample.facts,
        "load": round(os.getloadavg()[0], 2),
        "versions": {"implementation": package, "python": platform.python_version()} | _versions(),
        "machine": machine(),
    }


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def machine() -> dict[str, Any]:
    """The processor, its cores and the memory; no name of a host."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform == "linux" else 0
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    """The processor's name, with its family and model where the name alone says little."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines[:12])}
    name = found.get("model name") or platform.processor() or platform.machine()
    family = found.get("cpu family")
    return f"{name} (family {family}, model {found.get('model')})" if family else name


def row_files(folder: Path) -> list[Path]:
    """The files of rows in a folder; those of the GPU and of chat have rows of another form."""
    return sorted(path for path in folder.glob("*.jsonl") if not path.name.startswith(("gpu_", "chat_")))
