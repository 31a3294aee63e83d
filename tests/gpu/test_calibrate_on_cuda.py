"""`python -m seqattn calibrate` on a CUDA device: what is measured is saved, and used from then on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from seqattn import __main__ as command_line
from seqattn.attention import PagedAttention
from seqattn.cache import PagedKVCacheManager
from seqattn.calibrate import CalibrationBatch, Shape
from seqattn.constants import Chip, constants_for, load_constants, path_of
from seqattn.cuda_steps import CudaSteps
from seqattn.device import Heads

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

HEADS = Heads(8, 2, 128)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["seqattn", "calibrate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    return int(stopped.value.code or 0)


def test_a_shared_level_is_timed_and_longer_prompts_take_longer() -> None:
    timer = CudaSteps(HEADS, torch.device("cuda", 0))
    plain = []
    for num_shared in (256, 16384):
        batch = CalibrationBatch(Shape(32, 1, num_shared, 1, 0, 64), seed=1)
        _, runs = batch.forest
        times = [timer(batch, [False] * len(runs), []), timer(batch, [True] * len(runs), [0])]
        assert np.isfinite(times).all()
        assert min(times) > 1
        plain.append(times[0])
    assert plain[1] > 2 * plain[0], "every sequence reads the prompt for itself"


def test_constants_are_measured_saved_and_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEQATTN_CACHE_DIR", str(tmp_path))
    chip = Chip.of(torch.cuda.get_device_properties(0))
    assert run(monkeypatch, "--seconds", 4, "--heads", 8, 2, 128) == 0
    assert "ways measured" in capsys.readouterr().out
    found = load_constants(path_of(chip.name), chip)
    assert constants_for(chip) == found
    manager = PagedKVCacheManager(8, 16, 2, 128, torch.bfloat16, "cuda")
    assert PagedAttention(manager, 8, backend="flashinfer").cost_model.device == found
    assert run(monkeypatch, "--show") == 0
    assert str(path_of(chip.name).name) in "".join(capsys.readouterr().out.split())
