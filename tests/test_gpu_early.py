"""How `benchmarks.gpu_early` launches its kernels; without Triton, which stands in as something that does nothing."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import pytest

import benchmarks
import seqattn

GATHER, MERGE = ("_gather", "_gather_early"), ("_merge", "_merge_early")


@pytest.fixture
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """`seqattn.kernels` and `benchmarks.gpu_early`, imported anew and gone afterwards."""
    triton = MagicMock(jit=lambda function: function)
    names = {"triton": triton, "triton.language": triton.language, "triton.runtime": triton.runtime}
    with (
        patch.dict(sys.modules, names),
        patch.dict(vars(seqattn)),
        patch.dict(vars(benchmarks)),
    ):
        for name in ("seqattn.kernels", "benchmarks.gpu_early"):
            sys.modules.pop(name, None)
        yield import_module("seqattn.kernels"), import_module("benchmarks.gpu_early")


class Kernel:
    """Notes its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.fn = object()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:  # noqa: ANN401  as Triton's
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


def test_a_kernel_is_launched_before_what_goes_ahead_of_it_has_ended(modules: tuple[ModuleType, ModuleType]) -> None:
    kernel = Kernel()
    early = modules[1]._Early(kernel)
    early[3, 1, 1]("q", 7)
    assert kernel.launches == [((3, 1, 1), ("q", 7), {"launch_pdl": True})]
    assert early.fn is kernel.fn


@pytest.mark.parametrize(
    ("way", "changed", "other"), [("gathering_early", *[GATHER, MERGE]), ("merging_early", *[MERGE, GATHER])]
)
def test_only_the_kernel_that_is_named_is_another_meanwhile(
    way: str, changed: tuple[str, str], other: tuple[str, str], modules: tuple[ModuleType, ModuleType]
) -> None:
    kernels, early = modules
    before = {name: getattr(kernels, name) for name in ("_gather", "_merge")}
    with getattr(early, way)():
        assert getattr(kernels, changed[0]).kernel is getattr(early, changed[1])
        assert getattr(kernels, other[0]) is before[other[0]]
    assert {name: getattr(kernels, name) for name in before} == before


@pytest.mark.parametrize("names", [GATHER, MERGE], ids=["gather", "merge"])
def test_it_waits_and_then_does_what_the_kernel_does(
    names: tuple[str, str], modules: tuple[ModuleType, ModuleType]
) -> None:
    kernels, early = modules
    parameters = list(inspect.signature(getattr(kernels, names[0])).parameters)
    assert list(inspect.signature(getattr(early, names[1])).parameters) == parameters
    done: list[Any] = []
    early.tl.extra.cuda.gdc_wait = lambda: done.append("waited")
    with patch.object(early, names[0], lambda *arguments: done.append(arguments)):
        getattr(early, names[1])(*parameters)
    assert done == ["waited", tuple(parameters)]
