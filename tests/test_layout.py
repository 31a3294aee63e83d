"""One way down: which file may import which, and what importing a package loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple

import pytest

import radix
import seqattn
from tests.sources import ROOT, parse, sources

#: A file imports only from files further up. Every `__init__.py` and `__main__.py` stands apart.
ORDER = [
    # seqattn
    "seqattn/errors.py",
    "seqattn/command.py",
    "seqattn/counts.py",
    "seqattn/buffers.py",
    "seqattn/page_lists.py",
    "seqattn/copies.py",
    "seqattn/pages.py",
    "seqattn/indptr.py",
    "seqattn/packed.py",
    "seqattn/tail.py",
    "seqattn/append.py",
    "seqattn/kernels.py",
    "seqattn/row_kernel.py",
    "seqattn/cache.py",
    "seqattn/heads.py",
    "seqattn/neighbours.py",
    "seqattn/forest.py",
    "seqattn/load.py",
    "seqattn/one_load.py",
    "seqattn/steps.py",
    "seqattn/ways.py",
    "seqattn/chosen.py",
    "seqattn/device.py",
    "seqattn/constants.py",
    "seqattn/fit.py",
    "seqattn/groups.py",
    "seqattn/alike.py",
    "seqattn/run_costs.py",
    "seqattn/cost.py",
    "seqattn/levels.py",
    "seqattn/long_lists.py",
    "seqattn/hybrid.py",
    "seqattn/sequence.py",
    "seqattn/flat_tables.py",
    "seqattn/asked_batch.py",
    "seqattn/last_pages.py",
    "seqattn/known_forest.py",
    "seqattn/hybrid_tables.py",
    "seqattn/growth.py",
    "seqattn/descriptor.py",
    "seqattn/attention/plan.py",
    "seqattn/attention/torch_backend.py",
    "seqattn/attention/calls.py",
    "seqattn/attention/choice.py",
    "seqattn/attention/bound.py",
    "seqattn/attention/places.py",
    "seqattn/attention/wrapper.py",
    "seqattn/attention/wrapper_set.py",
    "seqattn/attention/views.py",
    "seqattn/attention/prepared.py",
    "seqattn/attention/streams.py",
    "seqattn/attention/fa3_sources.py",
    "seqattn/attention/flashinfer_backend.py",
    "seqattn/attention/front.py",
    "seqattn/attention/fixed.py",
    "seqattn/attention/capturing.py",
    "seqattn/attention/captured.py",
    "seqattn/attention/step.py",
    "seqattn/attention/graphs.py",
    "seqattn/attention/layers.py",
    "seqattn/calibrate.py",
    "seqattn/cuda_steps.py",
    # radix
    "radix/tokens.py",
    "radix/children.py",
    "radix/node.py",
    "radix/show.py",
    "radix/proof.py",
    "radix/tree.py",
    "radix/stats.py",
    "radix/retries.py",
    "radix/plan.py",
    "radix/history.py",
    "radix/reserve.py",
    "radix/running.py",
    "radix/state.py",
    "radix/adopt.py",
    "radix/changing.py",
    "radix/starting.py",
    "radix/audit.py",
    "radix/demote.py",
    "radix/explain.py",
    "radix/pin.py",
    "radix/cache.py",
    "radix/guard.py",
    "radix/session.py",
    "radix/session_store.py",
    "radix/integrations/transformers/attention.py",
    "radix/integrations/transformers/model.py",
    "radix/integrations/transformers/sampling.py",
    "radix/integrations/transformers/text.py",
    "radix/integrations/transformers/request.py",
    "radix/integrations/transformers/reader.py",
    "radix/integrations/transformers/graphs.py",
    "radix/integrations/transformers/decoding.py",
    "radix/integrations/transformers/cold_prompts.py",
    "radix/integrations/transformers/scheduler.py",
    "radix/integrations/transformers/packing.py",
    "radix/integrations/transformers/runner.py",
    "radix/integrations/transformers/open_requests.py",
    "radix/integrations/transformers/flight.py",
    "radix/integrations/transformers/asked.py",
    "radix/integrations/transformers/engine.py",
    "radix/integrations/transformers/chat.py",
    "radix/replay/lines.py",
    "radix/replay/request.py",
    "radix/replay/readers.py",
    "radix/replay/distinct.py",
    "radix/replay/workload.py",
    "radix/replay/report.py",
    "radix/replay/simulator.py",
    "radix/replay/tokenizer.py",
]

#: These know token ids and page numbers only: of seqattn nothing but the errors, and no torch.
NO_TENSORS = ["radix/tokens.py", "radix/node.py", "radix/tree.py"]

CORE = {"attrs", "numpy", "sortedcontainers", "torch"}
#: package of an extra → the files that may import it
EXTRAS = {
    "flashinfer": ["seqattn/append.py", "seqattn/attention/fa3_sources.py", "seqattn/attention/wrapper_set.py"],
    "triton": ["seqattn/kernels.py", "seqattn/row_kernel.py"],  # comes with torch on Linux
    "rich": ["radix/__main__.py", "seqattn/__main__.py"],
    "rich_click": ["radix/__main__.py", "seqattn/__main__.py", "seqattn/command.py"],
    "transformers": ["radix/integrations/transformers/attention.py"],
    "typing_extensions": [  # comes with torch; for types only
        "radix/integrations/transformers/chat.py",
        "radix/integrations/transformers/engine.py",
    ],
    "tiktoken": ["radix/replay/tokenizer.py"],
}
#: Triton compiles functions of a module that imports it: these import it as they load, and are loaded late themselves.
KERNELS = {"seqattn/kernels.py", "seqattn/row_kernel.py"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Import(NamedTuple):
    """An imported module, the line, and when it happens: as the file is loaded, in a call, or never (types only)."""

    module: str
    line: int
    when: Literal["load", "call", "never"]


def stands_apart(path: str) -> bool:
    return path.endswith(("/__init__.py", "/__main__.py"))


def file_of(module: str) -> str | None:
    """The project's file behind a module name, or None for anything else."""
    base = module.replace(".", "/")
    if not re.fullmatch(r"(seqattn|radix)(/\w+)*", base):
        return None
    found = (path for path in (f"{base}.py", f"{base}/__init__.py") if (ROOT / path).is_file())
    return next(found, None)


def imports(path: str) -> list[Import]:
    """Every import of a file, wherever it stands; `from a import b` counts as `a.b` where that is a module."""
    return list(_imports(parse(path), "load"))


def _imports(node: ast.AST, when: Literal["load", "call", "never"]) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module, f"line {child.lineno}: a relative import hides the layer it reaches into"
            assert not child.level, f"line {child.lineno}: likewise"
            names = (f"{child.module}.{alias.name}" for alias in child.names)
            modules = {name if file_of(name) else child.module for name in names}
            yield from (Import(module, child.lineno, when) for module in sorted(modules))
        elif isinstance(child, ast.Constant) and "." in str(child.value) and file_of(str(child.value)):
            yield Import(str(child.value), child.lineno, "call")  # a name for import_module
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(child, "never")
        elif isinstance(child, FUNCTIONS):
            yield from _imports(child, "call")
        else:
            yield from _imports(child, when)


def upward(path: str, order: list[str]) -> list[str]:
    """What is wrong with a file's imports, by the list, a sentence each."""
    wrong = []
    for module, line, when in imports(path):
        target = file_of(module)
        if target is None:
            continue
        if stands_apart(target):
            wrong.append(f"{path}:{line} imports {module}: import from the file that defines the name")
        elif target not in order:
            wrong.append(f"{path}:{line} imports {target}, which is not in ORDER")
        elif when != "never" and order.index(target) >= order.index(path):
            wrong.append(f"{path}:{line} imports {target}, which does not stand further up in ORDER")
    return wrong


# -- direction ---------------------------------------------------------------------------------------------------------


def test_the_order_names_every_file_once_and_no_other() -> None:
    present = [path for path in sources("seqattn", "radix") if not stands_apart(path)]
    missing, gone = sorted(set(present) - set(ORDER)), sorted(set(ORDER) - set(present))
    assert not missing, f"put {missing} into ORDER (tests/test_layout.py), below all that they import"
    assert not gone, f"ORDER names {gone}, which do not exist"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", [path for path in ORDER if (ROOT / path).is_file()])
def test_a_file_imports_only_from_files_further_up(path: str) -> None:
    wrong = upward(path, ORDER)
    assert not wrong, "\n".join(wrong)


def test_seqattn_knows_nothing_of_radix() -> None:
    found = [f"{path}:{i.line}" for path in sources("seqattn") for i in imports(path) if i.module.startswith("radix")]
    assert not found, f"seqattn must not import radix, but does at {found}"


def test_the_check_of_directions_sees_an_import_wherever_it_hides() -> None:
    (wrong,) = upward("seqattn/counts.py", ORDER[::-1])
    assert wrong.endswith("imports seqattn/errors.py, which does not stand further up in ORDER")
    code = """if TYPE_CHECKING:
    import a
import b
def f():
    from c.d import e
if b:
    import g
h = "radix.tree"
"""
    found = list(_imports(ast.parse(code), "load"))
    want = [("a", 2, "never"), ("b", 3, "load"), ("c.d", 5, "call"), ("g", 7, "load"), ("radix.tree", 8, "call")]
    assert found == want


@pytest.mark.parametrize("path", NO_TENSORS)
def test_the_tree_knows_of_seqattn_only_its_errors_and_nothing_of_torch(path: str) -> None:
    modules = {i.module for i in imports(path) if i.module.partition(".")[0] in {"seqattn", "torch"}}
    assert modules <= {"seqattn.errors"}, f"{path} imports {sorted(modules)}"


@pytest.mark.parametrize("path", sources("seqattn", "radix"))
def test_what_is_not_required_is_imported_late_and_only_where_it_belongs(path: str) -> None:
    for module, line, when in imports(path):
        top, where = module.partition(".")[0], f"{path}:{line} imports {module}"
        if top in sys.stdlib_module_names | CORE | {"seqattn", "radix"}:
            continue
        assert top in EXTRAS, f"{where}: declare its extra in pyproject.toml and here in EXTRAS"
        assert path in EXTRAS[top], f"{where}: EXTRAS allows it only in {EXTRAS[top]}"
        late = when != "load" or path in KERNELS
        assert late, f"{where} when it is loaded: import it inside the function that needs it"


@pytest.mark.parametrize("path", sources("seqattn", "radix"))
def test_files_of_kernels_are_imported_late(path: str) -> None:
    if path in KERNELS:
        return  # one may use another
    found = [i.line for i in imports(path) if i.when == "load" and file_of(i.module) in KERNELS]
    assert not found, f"{path} imports kernels at lines {found} when it is loaded: they need a package of CUDA"


def test_an_error_about_a_missing_extra_names_an_extra_that_exists() -> None:
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^(\w+) = \[", section.split("\n[")[0], re.MULTILINE))
    known = {"flashinfer", "chat", "gguf", "cli", "metrics", "events", "redis", "ray", "bench", "dev", "all"}
    assert extras == known
    for path in sources("seqattn", "radix"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("MissingExtraError"):
                named = node.args[0]
                assert isinstance(named, ast.Constant), f"{path}:{node.lineno}: name the extra in the call"
                assert named.value in extras, f"{path}:{node.lineno}: no extra {named.value!r}"


# -- what importing loads ----------------------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Names of the packages from outside the standard library that a fresh Python has loaded after `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    before = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], check=True, capture_output=True, text=True
    ).stdout
    return set(out.split()) - set(before.split()) - sys.stdlib_module_names


def test_importing_the_packages_loads_nothing_else() -> None:
    assert loaded_by("import seqattn, radix") == {"seqattn", "radix"}


def test_errors_and_the_page_allocator_come_without_torch() -> None:
    loaded = loaded_by("from seqattn import PageAllocator, NoPageError; PageAllocator(4, 2).allocate(3)")
    assert loaded >= {"numpy"}
    assert "torch" not in loaded


def test_the_tree_comes_without_torch() -> None:
    assert "torch" not in loaded_by("from radix import RadixTree")


@pytest.mark.parametrize("package", [seqattn, radix])
def test_every_public_name_is_there_at_first_use_and_listed(package: object) -> None:
    names: list[str] = getattr(package, "__all__")  # noqa: B009  a module's type has no __all__
    assert names == sorted(set(names))
    assert set(names) <= set(dir(package))
    for name in names:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        getattr(package, "Nonsense")  # noqa: B009  mypy knows that there is none
