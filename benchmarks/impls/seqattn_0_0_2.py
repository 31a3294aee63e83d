"""seqattn 0.0.2 as published. It imports flashinfer, which what is measured never calls."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from benchmarks.impls.stand_ins import stand_in_for
from benchmarks.peers import ROOT

__all__ = ["Old"]


def _published() -> ModuleType:
    """The package from this environment, not the one in the checkout that this file is part of."""
    path = sys.path[:]
    sys.path = [entry for entry in sys.path if entry not in {"", str(ROOT)}]
    try:
        stand_in_for("flashinfer")
        return import_module("seqattn")
    finally:
        sys.path = path


class Old:
    """Has pages and their packing; no tree."""

    seqattn = _published()
    package = f"seqattn {version('seqattn')}"
    assert seqattn.__version__ == version("seqattn") == "0.0.2"
