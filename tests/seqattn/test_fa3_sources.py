"""What flashinfer compiles fa3 from: the copy has one line less, and where none can be made fa3 is not used."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from attrs import evolve

from seqattn.attention import fa3_sources
from seqattn.attention.fa3_sources import (
    copy_mended,
    has_early_arrival,
    mended,
    sound_costs,
    why_fa3_cannot_be_used,
    without_early_arrival,
)
from seqattn.device import Device
from seqattn.errors import BadValueError, SeqAttnError

BARRIER = """(NUM_MMA_THREADS,
                                    cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
"""
FIRST, SECOND = f"    cutlass::arch::NamedBarrier::arrive{BARRIER}", f"    cutlass::arch::NamedBarrier::sync{BARRIER}"
OTHER = (
    "    cutlass::arch::NamedBarrier::arrive(NUM_MMA_THREADS, /*id=*/static_cast<int>(NamedBarriers::kValueEmpty));\n"
)
FLAWED = f"copy();\n{OTHER}{FIRST}lse();\n{SECOND}write();\n"
SOUND = f"copy();\n{OTHER}lse();\n{SECOND}write();\n"
EPILOGUE = "flashinfer/attention/hopper/epilogue.cuh"


@dataclass
class Spec:
    """What flashinfer keeps of a kernel that it compiles."""

    name: str
    extra_include_dirs: list[Path] | None = None
    flags: list[str] = field(default_factory=list)

    def build_and_load(self) -> str:
        """What is compiled."""
        if "-broken" in self.flags:
            raise RuntimeError("Ninja build failed.")
        return self.name


class Installed:
    """A flashinfer to be imported, with these headers and a compiler."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, epilogue: str | None = FLAWED) -> None:
        self.include, self.generated, self.num_cleared = folder / "include", folder / "cache" / "generated", 0
        self.flags = ["-O3"]
        header = self.include / EPILOGUE
        header.parent.mkdir(parents=True)
        (self.include / "flashinfer/math.cuh").write_text("#pragma once\n")
        if epilogue is not None:
            header.write_text(epilogue)
            header.chmod(0o444)
        self.compiler = folder / "cuda/bin/nvcc"
        self.compiler.parent.mkdir(parents=True)
        self.compiler.write_text("#!/bin/sh\n")
        self.compiler.chmod(0o755)
        names = ("flashinfer", "flashinfer.jit", "flashinfer.jit.env", "flashinfer.jit.cpp_ext", "flashinfer.prefill")
        modules: dict[str, Any] = {name: ModuleType(name) for name in names}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
        modules["flashinfer.jit.env"].FLASHINFER_INCLUDE_DIR = self.include
        modules["flashinfer.jit.env"].FLASHINFER_GEN_SRC_DIR = self.generated
        modules["flashinfer.jit.cpp_ext"].get_cuda_path = lambda: str(folder / "cuda")
        self.prefill = modules["flashinfer.prefill"]
        self.prefill.gen_batch_prefill_module = self.generate
        self.prefill.get_batch_prefill_module = self
        for name in ("FLASHINFER_DISABLE_JIT", "FLASHINFER_NVCC", "SEQATTN_FA3"):
            monkeypatch.delenv(name, raising=False)

    def generate(self, backend: str, *_args: object, **options: object) -> Spec:
        return Spec(f"prefill_{backend}", [Path("/mine")] if options.get("more") else None, self.flags)

    def cache_clear(self) -> None:
        self.num_cleared += 1


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    return Installed(tmp_path, monkeypatch)


def test_the_first_of_the_two_is_left_out_and_nothing_else() -> None:
    assert without_early_arrival(FLAWED) == SOUND
    assert without_early_arrival(FLAWED.replace(FIRST, FIRST.replace(",\n" + 36 * " ", ", "))) == SOUND


@pytest.mark.parametrize(
    "text", [SOUND, FLAWED.replace(SECOND, ""), FLAWED + FIRST, FLAWED + SECOND, ""],
    ids=["sound", "no second", "two firsts", "two seconds", "empty"],
)  # fmt: skip
def test_a_file_that_is_another_by_now_is_not_changed(text: str) -> None:
    assert without_early_arrival(text) is None


@pytest.mark.parametrize(
    "text", [FLAWED, FLAWED.replace("cutlass::arch::", ""), FLAWED.replace("::arrive(", "::arrive ( "), FLAWED + FIRST]
)
def test_the_mistake_is_seen_however_it_is_written(text: str) -> None:
    assert has_early_arrival(text)


@pytest.mark.parametrize(
    "text", [SOUND, FLAWED.replace(FIRST, "//" + FIRST.replace("\n", " ")), FLAWED.replace(FIRST, f"/*{FIRST}*/"),
             FLAWED.replace("arrive(NUM_MMA_THREADS,\n", "arrive(NUM_MMA_THREADS + 32,\n")],
    ids=["sound", "a comment", "a long comment", "for a warp more"],
)  # fmt: skip
def test_files_without_it_are_told_from_those(text: str) -> None:
    assert not has_early_arrival(text)


def test_a_file_with_it_that_is_not_known_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Installed(tmp_path, monkeypatch, FLAWED + FIRST)
    assert str(why_fa3_cannot_be_used()).endswith("epilogue.cuh is not one of those that are known")
    assert installed.prefill.gen_batch_prefill_module == installed.generate


def test_fa3_is_compiled_from_the_copy_and_all_else_as_before(installed: Installed) -> None:
    assert why_fa3_cannot_be_used() is None
    assert installed.num_cleared == 1, "who had asked for fa3 before asks again"
    generate = installed.prefill.gen_batch_prefill_module
    assert generate("fa2", 1) == Spec("prefill_fa2", None, ["-O3"])
    spec = generate("fa3", 1, more=True)
    sources, *others = spec.extra_include_dirs
    assert (spec.name, others, spec.flags) == ("prefill_fa3_one_barrier", [Path("/mine")], ["-O3"])
    assert (sources / EPILOGUE).read_text() == SOUND
    assert (sources / "flashinfer/math.cuh").read_text() == "#pragma once\n"
    assert (installed.include / EPILOGUE).read_text() == FLAWED, "flashinfer's own stays as it is"


def test_the_copy_is_made_once_for_each_content(installed: Installed) -> None:
    folder = installed.generated
    first = copy_mended(installed.include, folder)
    made = (first / EPILOGUE).stat().st_mtime_ns
    assert copy_mended(installed.include, folder) == first
    assert (first / EPILOGUE).stat().st_mtime_ns == made
    (installed.include / EPILOGUE).chmod(0o644)
    (installed.include / EPILOGUE).write_text(FLAWED + "// newer\n")
    assert copy_mended(installed.include, folder) != first
    assert len(list(folder.iterdir())) == 2, "nothing else is left there"


def test_a_copy_that_another_process_has_made_meanwhile_is_taken(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        rename(self, target)
        raise FileExistsError(target)

    monkeypatch.setattr(Path, "rename", late)
    assert (copy_mended(installed.include, installed.generated) / EPILOGUE).read_text() == SOUND


def test_sound_sources_are_left_to_flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Installed(tmp_path, monkeypatch, SOUND)
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    assert why_fa3_cannot_be_used() is None
    assert installed.prefill.gen_batch_prefill_module == installed.generate
    assert installed.num_cleared == 0
    assert not installed.generated.exists()


def test_without_a_way_to_compile_the_copy_shared_levels_are_fa2(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    with monkeypatch.context() as there:
        there.setenv("FLASHINFER_DISABLE_JIT", "1")
        with pytest.warns(RuntimeWarning, match="without that mistake: FLASHINFER_DISABLE_JIT is set"):
            assert sound_costs(device) == evolve(device, has_fa3=False)
    with monkeypatch.context() as there:
        there.setenv("FLASHINFER_NVCC", "/no/nvcc")
        with pytest.warns(RuntimeWarning, match="no compiler at /no/nvcc"):
            assert not sound_costs(device).has_fa3
    installed.compiler.unlink()
    with pytest.warns(RuntimeWarning, match="no compiler at .*/cuda/bin/nvcc"):
        assert not sound_costs(device).has_fa3
    assert installed.prefill.gen_batch_prefill_module == installed.generate, "nothing is half done"


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Installed(tmp_path, monkeypatch, None)
    with pytest.warns(RuntimeWarning, match=r"FileNotFoundError: .*epilogue\.cuh"):
        assert not sound_costs(Device()).has_fa3


def test_a_folder_that_cannot_be_written_is_named(installed: Installed) -> None:
    installed.generated.parent.mkdir()
    installed.generated.write_text("a file")
    with pytest.warns(RuntimeWarning, match="FileExistsError"):
        assert not sound_costs(Device()).has_fa3


def test_a_device_without_fa3_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa3_sources, "why_fa3_cannot_be_used", lambda: pytest.fail("asked"))
    device = Device(has_fa3=False)
    assert sound_costs(device) is device


def test_its_options_reach_the_function_that_it_stands_for() -> None:
    seen: list[tuple[object, ...]] = []

    def generate(*args: object, **options: object) -> Spec:
        seen.append((*args, options))
        return Spec("made")

    assert mended(generate, Path("/headers"))("fa3", 1, 2, more=3).extra_include_dirs == [Path("/headers")]
    assert seen == [("fa3", 1, 2, {"more": 3})]


def test_it_is_done_once(installed: Installed) -> None:
    assert why_fa3_cannot_be_used() is None
    assert why_fa3_cannot_be_used() is None
    assert installed.prefill.gen_batch_prefill_module("fa3").name == "prefill_fa3_one_barrier"
    assert installed.num_cleared == 1


def test_what_cannot_be_compiled_says_how_to_go_on(installed: Installed) -> None:
    assert why_fa3_cannot_be_used() is None
    generate = installed.prefill.gen_batch_prefill_module
    assert generate("fa3").build_and_load() == "prefill_fa3_one_barrier"
    installed.flags = ["-broken"]
    with pytest.raises(SeqAttnError, match=r"Ninja build failed\..*SEQATTN_FA3=off"):
        generate("fa3").build_and_load()
    with pytest.raises(RuntimeError, match="Ninja"):
        generate("fa2").build_and_load()


def test_a_flashinfer_that_is_built_in_another_way_is_named(installed: Installed) -> None:
    del installed.prefill.get_batch_prefill_module
    assert "get_batch_prefill_module" in str(why_fa3_cannot_be_used())
    assert installed.prefill.gen_batch_prefill_module == installed.generate, "nothing is half done"
    with pytest.raises(SeqAttnError, match="describes fa3 by a object"):
        mended(lambda *_: object(), Path("/headers"))("fa3")


@pytest.mark.parametrize("word", ["off", "0", "no", "False", " OFF "])
def test_fa3_can_be_turned_off(installed: Installed, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("SEQATTN_FA3", word)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sound_costs(Device()).has_fa3
    assert installed.prefill.gen_batch_prefill_module == installed.generate


def test_a_word_that_is_neither_on_nor_off_is_refused(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("", "on", "1", "Yes"):
        monkeypatch.setenv("SEQATTN_FA3", word)
        assert sound_costs(Device()).has_fa3
    monkeypatch.setenv("SEQATTN_FA3", "of")
    with pytest.raises(BadValueError, match="SEQATTN_FA3 is 'of' in the environment: it must be 'off' or 'on'"):
        sound_costs(Device())
    assert not sound_costs(evolve(Device(), has_fa3=False)).has_fa3, "nobody asks where there is none"
    assert installed.num_cleared
