"""What the GPU benchmarks do before and after they measure: options, shapes, and what a file says of its run."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_about, gpu_append, gpu_attention, gpu_step, rows
from benchmarks.gpu_promises import (
    AGAINST_PLAIN,
    OVER_BOUND,
    Kept,
    _at_least,
    _at_most,
    _cascade,
    _error,
    _of_forks,
    _of_host,
    _of_shapes,
    _of_steps,
    _share,
    in_table,
)
from benchmarks.gpu_report import OLDER, Recorded, _promises, _recorded_steps
from benchmarks.gpu_shapes import PAGE_SIZE, one_prefix
from seqattn.forest import Run
from tests.gpu.batches import relative_error

SCRIPTS = ["gpu_append", "gpu_attention", "gpu_parts", "gpu_step"]
CLOCKS = "clocks MHz, SM and memory"
SAID = "580.159.04, 1980, 3201\n"


def host(batch: int, documents: int, us: float) -> dict[str, Any]:
    return {"shape": [batch, 1, 1024, documents, 0, 64], "forest_us": us / 2, "planner_us": us / 2}


def typed(monkeypatch: pytest.MonkeyPatch, script: str, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"/somewhere/benchmarks/{script}.py", *given])


def fake_gpu(monkeypatch: pytest.MonkeyPatch, said: dict[str, str] | None, uuid: str | None = "12-ab") -> list[str]:
    """A second GPU, and an nvidia-smi that says this of each device, or none; the devices that it is asked for."""
    asked: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[0] == "nvidia-smi"
        assert command[1] == "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem"
        if said is None:
            raise FileNotFoundError(command[0])
        asked.append(command[-1].removeprefix("--id="))
        if asked[-1] not in said:
            raise subprocess.CalledProcessError(6, command)
        return SimpleNamespace(stdout=said[asked[-1]])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    properties = SimpleNamespace() if uuid is None else SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(subprocess, "run", run)
    return asked


# -- about -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uuid", "said", "asked"),
    [
        ("12-ab", {"GPU-12-ab": SAID, "1": "another"}, ["GPU-12-ab"]),
        ("12-ab", {"1": SAID}, ["GPU-12-ab", "1"]),
        (None, {"1": SAID}, ["1"]),
    ],
    ids=["by name", "by number", "without a name"],
)
def test_driver_and_clocks_are_those_of_the_current_device(
    monkeypatch: pytest.MonkeyPatch, uuid: str | None, said: dict[str, str], asked: list[str]
) -> None:
    found = fake_gpu(monkeypatch, said, uuid)
    about = gpu_about.about_run()
    assert (about["device"], about["torch"]) == ("NVIDIA H200", torch.__version__)
    assert (about["driver"], about[CLOCKS]) == ("580.159.04", [1980, 3201])
    assert found == asked


@pytest.mark.parametrize("said", [None, {}, {"1": "No devices were found\n"}, {"1": "580.1, [N/A], [N/A]\n"}], ids=str)
def test_what_nvidia_smi_does_not_say_is_none(monkeypatch: pytest.MonkeyPatch, said: dict[str, str] | None) -> None:
    fake_gpu(monkeypatch, said)
    about = gpu_about.about_run()
    assert (about["driver"], about[CLOCKS]) == (None, None)


def test_without_a_gpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_gpu(monkeypatch, {"1": SAID})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    about = gpu_about.about_run()
    assert (about["device"], about["driver"], about[CLOCKS], asked) == ("CPU", None, None, [])
    assert json.loads(json.dumps(about)) == about


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--out", "runs/1", "--only", "known"], "--out DIR --only known"),
        (["--heads", "8", "1", "128", "--out=/tmp/a b"], "--heads 8 1 128 --out=DIR"),
        (
            ["--trace", "/data/conversation_trace.jsonl.gz", "--out", "x"],
            "--trace conversation_trace.jsonl.gz --out DIR",
        ),
        ([], ""),
    ],
)
def test_the_command_is_told_without_paths_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, given: list[str], told: str
) -> None:
    typed(monkeypatch, "gpu_attention", *given)
    assert gpu_about.about_run()["command"] == f"python -m benchmarks.gpu_attention {told}".rstrip()


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_file_of_attention_begins_with_what_recorded_files_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Recorded("h200")
    monkeypatch.setattr(gpu_attention, "KNOWN", [None])
    for name in ("copy_rate", "matrix_rate"):
        monkeypatch.setattr(gpu_attention, name, lambda: 4.24e12)
    monkeypatch.setattr(gpu_attention, "Step", lambda *_: None)
    monkeypatch.setattr(gpu_attention, "measure", lambda *_: known.rows[0])
    typed(monkeypatch, "gpu_attention", "--out", str(tmp_path), "--only", "known")
    fake_gpu(monkeypatch, {"GPU-12-ab": SAID})
    gpu_attention.main()
    about, row = map(json.loads, (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert about.keys() == known.about.keys() | {"machine"}
    assert about["machine"] == rows.machine()
    assert about["command"] == "python -m benchmarks.gpu_attention --out DIR --only known"
    assert row == known.rows[0]


def test_every_choice_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, two documents on it, and on one of these a long conversation."""
    runs = [Run(0, 60, 0, 32, None), Run(0, 30, 32, 64, 0), Run(30, 60, 32, 64, 0)]
    longer = [*runs, Run(59, 60, 64, 576, 2)]
    step: Any = SimpleNamespace(forest=(list(range(60)), runs), with_long=longer)
    packed: list[tuple[int, list[bool]]] = []

    def pack(*arguments: Any, page_size: int) -> int:  # noqa: ANN401  as `pack_runs`
        assert page_size == PAGE_SIZE
        packed.append((len(arguments[3][1]), arguments[4]))
        return len(packed)

    step.tables = step.lens = step.ones = None
    monkeypatch.setattr(gpu_attention, "pack_runs", pack)
    found = list(gpu_attention.every_choice(step))
    names = [name for name, _, _ in found]
    assert len(set(names)) == len(names) == 1 + 2 * 5 + 25 + 5 + 2 * 25
    assert names[0] == "plain"
    assert {name[:7] for name in names if name.startswith("long ") and "+" not in name} == {"long 2:"}
    assert packed == [
        (3, [False] * 3), (3, [True, False, False]), (3, [False, True, True]), (3, [True] * 3),
        (4, [False] * 3 + [True]), (4, [True, False, False, True]), (4, [False, True, True, True]),
    ]  # fmt: skip
    assert all(len(choices) == 1 + name.count(":") for name, _, choices in found)


def test_rows_of_a_step_say_what_they_ran_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "Model", lambda _: None)
    monkeypatch.setattr(gpu_step, "measure_step", lambda *_, hybrid: {"packing": "hybrid" if hybrid else "plain"})
    monkeypatch.setattr(gpu_step, "measure_forks", lambda _: {"forks": 64})
    typed(monkeypatch, "gpu_step", "--out", str(tmp_path), "--batch", "8")
    gpu_step.main()
    rows = list(map(json.loads, (tmp_path / "step.jsonl").read_text(encoding="utf-8").splitlines()))
    assert [row.get("packing", row.get("forks")) for row in rows] == ["plain", "hybrid", 64]
    for row in rows:
        assert row.items() >= {"batch": 8, "layers": 32, "device": "CPU", "driver": None}.items()
        assert row["command"] == "python -m benchmarks.gpu_step --out DIR --batch 8"


def test_rows_of_a_chat_say_what_they_ran_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="whole models: pip install 'seqattn[chat]'")
    gpu_chat: Any = import_module("benchmarks.gpu_chat")
    monkeypatch.setattr(gpu_chat, "Work", lambda *_, **_options: None)
    monkeypatch.setitem(gpu_chat.PARTS, "host", lambda _: iter([{"packing": "plain"}]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    typed(monkeypatch, "gpu_chat", "--out", str(tmp_path), "--only", "host", "--tiny")
    gpu_chat.main()
    (row,) = map(json.loads, (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines())
    assert row.items() >= {"part": "host", "packing": "plain", "device": "CPU", "driver": None}.items()
    assert {"torch", "transformers"} <= row["versions"].keys()
    assert row["command"] == "python -m benchmarks.gpu_chat --out DIR --only host --tiny"


# -- options and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_text_at_the_top(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"benchmarks.{script}")
    typed(monkeypatch, script, "--help")
    with pytest.raises(SystemExit, match="0"):
        module.main()
    assert f"python -m benchmarks.{script} --out DIR" in capsys.readouterr().out


def test_batches_of_new_turns_are_whole_pages_and_small_beside_the_memory_of_a_device() -> None:
    shapes = gpu_append.SHAPES
    assert len(set(shapes)) == len(shapes) == 10
    token_bytes = 2 * gpu_append.NUM_KV_HEADS * gpu_append.HEAD_DIM * 2
    for shape in shapes:
        assert not shape.system_len % PAGE_SIZE
        assert not shape.own_len % PAGE_SIZE
        assert (shape.system_len + shape.batch * shape.own_len) * token_bytes * gpu_append.NUM_LAYERS < 1 << 30


def small_step() -> gpu_append.Step:
    return gpu_append.Step(one_prefix(3, 64, 16), "cpu", "torch")


def test_new_turns_are_computed_over_one_prompt() -> None:
    step = small_step()
    assert step.manager.available_pages_count == 0
    step.descriptor.check()
    expected = step.expected()
    for is_chosen in (False, True):
        data = step.packed(is_chosen=is_chosen)
        assert len(data.levels) == (1 if is_chosen else 2), "a prompt of four pages is not worth a level"
        found = step.ours(data)(gpu_append.NUM_LAYERS - 1)
        assert relative_error(found, expected) < 1e-2


class PlainWrapper:
    """Stands for flashinfer's: checks what it is told, and computes nothing."""

    def __init__(self, workspace: torch.Tensor, layout: str, *, backend: str) -> None:
        assert (layout, backend[:2]) == ("NHD", "fa")

    def plan(self, *tables: Any, causal: bool, **dtypes: torch.dtype) -> None:  # noqa: ANN401  tensors and numbers
        assert causal
        assert set(dtypes.values()) == {torch.bfloat16}
        assert [table.tolist() for table in tables[:2]] == [[0, 16, 32, 48], [0, 5, 10, 15]]
        assert all(table.dtype == torch.int32 for table in tables[:4])
        assert tables[2].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3, 6]
        assert tables[3].tolist() == [16] * 3
        assert tables[4:] == (32, 8, 128, 16)

    def run(self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], *, out: torch.Tensor) -> torch.Tensor:
        assert [list(cache.shape) for cache in caches] == [[7, 16, 8, 128]] * 2
        return out.copy_(q)


def test_a_row_of_new_turns_has_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(layers: Any, num_layers: int) -> tuple[float, float]:  # noqa: ANN401  a function of no arguments
        assert len(layers()) == num_layers
        return 10.0, 0.5

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=PlainWrapper))
    monkeypatch.setattr(gpu_append, "device_us", once)
    monkeypatch.setattr(gpu_append.Step, "kernels", lambda _: ["fa2:3"])
    step = small_step()
    monkeypatch.setattr(gpu_append, "Step", lambda _: step)
    monkeypatch.setattr(gpu_append, "SHAPES", [step.shape])
    typed(monkeypatch, "gpu_append", "--out", str(tmp_path))
    gpu_append.main()
    about, row = map(json.loads, (tmp_path / "append.jsonl").read_text(encoding="utf-8").splitlines())
    assert about["command"] == "python -m benchmarks.gpu_append --out DIR"
    assert (row["name"], row["ours_levels"], row["every_run_levels"]) == ("(3, 64, 16)", 1, 2)
    for way in ("plain_fa2", "plain_fa3", "ours", "every_run"):
        assert row[f"{way}_us"] == 10
        assert (row[f"{way}_error"] < 1e-2) == (not way.startswith("plain")), "the stand-in computes nothing"


@pytest.mark.parametrize(
    ("promise", "is_kept"),
    [
        (_at_least("a", 2.0, 2.0), True), (_at_least("a", 2.0, 1.99), False),
        (_at_most("a", 2.0, 2.0), True), (_at_most("a", 2.0, 2.01), False),
        (_share("a", 0.05, 0.05), True), (_share("a", 0.05, 0.051), False), (_share("a", 0.05, -0.1), True),
        (_error("a", 1e-2, [{"error": 1e-3}, {"error": 1e-2}]), True),
        (_error("a", 1e-2, [{"error": 1.1e-2}, {"error": 1e-3}]), False),
        (next(_of_host([host(256, 1, 299), host(64, 1, 400), host(256, 4, 1)])), True),
        (next(_of_host([host(256, 1, 100), host(256, 1, 301), host(256, 4, 1)])), False),
    ],
)  # fmt: skip
def test_a_promise_is_kept_up_to_its_limit(promise: Kept, *, is_kept: bool) -> None:
    assert promise.is_kept is is_kept
    assert in_table([promise]).endswith(" yes |" if is_kept else " **no** |")


def test_the_promises_that_are_not_kept_are_these() -> None:
    """A run that loses another one, or wins one, is to be told of in words too."""
    assert [promise.what for promise in _promises() if not promise.is_kept] == [
        "against the cascade wrapper, the fixed shapes with 32 and 32 heads",
        "planner behind the best choice, worst of 48 shapes that it had not seen",
        "ours behind plain decode, worst of 48 shapes that it had not seen",
        "planner, CPU time, a new batch of 256 with one prefix",
        "planner, CPU time, a new batch of 256 with a forest",
        "`plan` over flashinfer's by hand, a batch of which nothing is known, hybrid",
    ]


def test_with_an_older_flashinfer_the_promises_that_are_not_kept_are_these() -> None:
    """All but those of the planner, for which every choice would have to be measured."""
    older = Recorded(OLDER)
    assert older.about["flashinfer"] == "0.6.18.post1"
    steps = _recorded_steps(OLDER)
    promises = [
        *_of_shapes({row["name"]: row for row in older.rows}),
        _cascade("all", older.rows),
        _error("all", 1e-2, older.rows),
        *_of_host(older.rows),
        *_of_steps({row["packing"]: row for row in steps if "packing" in row}),
        *_of_forks(next(row for row in steps if "forks" in row)),
    ]
    assert len(promises) == len(AGAINST_PLAIN) + len(OVER_BOUND) + 3 + 2 + 7 + 1
    assert [promise.what for promise in promises if not promise.is_kept] == [
        "planner, CPU time, a new batch of 256 with a forest",
        "`run`, CPU time over flashinfer's by hand",
    ]
    assert all(row["ours_us"] <= 1.02 * row["plain_us"] for row in older.rows)
