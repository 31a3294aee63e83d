"""House habits that a machine can hold: small files and functions, documented names, one version, no strange paths."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

import pytest

import radix
import seqattn
from tests.sources import ROOT, parse, sources

PACKAGES = ("seqattn", "radix")

#: The most lines of a file. Tests may be longer: a file of them is a list, read one by one.
MOST_LINES = {"seqattn": 300, "radix": 300, "tests": 400, "examples": 79, "benchmarks": 300}

#: Longer files, and why each is still one idea.
LONG_FILES = {
    "examples/chat.py": "a conversation that is printed as it goes, then a table and a picture of it",
    "radix/cache.py": "every public method of PrefixCache; 230 of its lines are their docstrings",
    "radix/integrations/transformers/engine.py": "every public method of Engine; 130 of its lines are their docstrings",
    "seqattn/descriptor.py": "every public method of CacheDescriptor; 120 of its lines are their docstrings",
    "radix/tree.py": "match, insert, touch and trim share one walk; 140 of its lines are docstrings and pictures",
}


def length(path: str) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def functions(path: str) -> Iterator[tuple[int, str]]:
    """Lines of each function, from `def` to its end, its docstring not counted, and where it stands."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            yield lines, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", sources(*MOST_LINES))
def test_a_file_is_short(path: str) -> None:
    found, most = length(path), MOST_LINES[path.partition("/")[0]]
    if path in LONG_FILES:
        assert found > most, f"{path} has only {found} lines now: take it out of LONG_FILES"
    else:
        assert found <= most, f"{path} has {found} lines, {most} is the most: split it, or say why not in LONG_FILES"


def test_every_excuse_is_about_a_file_that_exists() -> None:
    assert set(LONG_FILES) <= set(sources(*MOST_LINES))


@pytest.mark.parametrize("package", PACKAGES)
def test_nineteen_functions_of_twenty_have_at_most_25_lines(package: str) -> None:
    found = sorted(item for path in sources(package) for item in functions(path))
    over = [f"{lines:4} {where}" for lines, where in found if lines > 25]
    assert len(over) <= len(found) / 20, f"{len(over)} of {len(found)} functions are longer:\n" + "\n".join(over)


def documented(value: object, name: str) -> bool:
    """Has text of its own: neither the signature that a dataclass writes for itself, nor what `object` says."""
    text = inspect.getdoc(value)
    return bool(text) and not str(text).startswith(f"{name}(") and text != inspect.getdoc(type(value))


def public_names() -> list[tuple[str, object]]:
    """Each exported class or function, and each public method and property of the classes."""
    found: list[tuple[str, object]] = []
    for package in (seqattn, radix):
        for name in package.__all__:
            value = getattr(package, name)
            found.append((name, value))
            if inspect.isclass(value):
                found += [(f"{name}.{key}", item) for key, item in vars(value).items() if _is_public(key, item)]
    return found


def _is_public(key: str, item: object) -> bool:
    has_doc = inspect.isfunction(item) or isinstance(item, property | classmethod | staticmethod)
    return has_doc and not key.startswith("_")


def test_every_public_name_is_documented() -> None:
    names = public_names()
    assert len(names) > 80
    bare = [name for name, value in names if not documented(value, name)]
    assert not bare, f"no docstring: {bare}"


def writes_to_tables(path: str) -> list[int]:
    """Lines that assign to entries of a page table, or to what the same function has called a part of one."""
    found: list[int] = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            steps = [step for step in ast.walk(node) if isinstance(step, ast.Assign | ast.AnnAssign | ast.AugAssign)]
            parts = {ast.unparse(name) for step in steps for name in _names(step) if _is_table(step.value, set())}
            found += [step.lineno for step in steps for name in _names(step) if _is_entry(name, parts)]
    return found


def _names(step: ast.Assign | ast.AnnAssign | ast.AugAssign) -> list[ast.expr]:
    targets = step.targets if isinstance(step, ast.Assign) else [step.target]
    return [name for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]


def _is_table(value: ast.expr | None, parts: set[str]) -> bool:
    values = value.elts if isinstance(value, ast.Tuple) else [value]
    return any(
        (isinstance(each, ast.Attribute) and each.attr == "table")
        or (isinstance(each, ast.Name) and each.id in parts)
        or (isinstance(each, ast.Subscript) and _is_table(each.value, parts))
        for each in values
    )


def _is_entry(name: ast.expr, parts: set[str]) -> bool:
    return isinstance(name, ast.Subscript) and _is_table(name.value, parts)


def test_entries_of_page_tables_are_written_in_one_file() -> None:
    """What is remembered of a table is void then, which only `SequenceData` knows to say."""
    assert len(writes_to_tables("seqattn/sequence.py")) == 2
    others = {path: writes_to_tables(path) for path in sources(*PACKAGES) if path != "seqattn/sequence.py"}
    assert not {path: lines for path, lines in others.items() if lines}, "use `write` or `write_last`"


def test_the_version_stands_in_the_changelog() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == seqattn.__version__


def test_texts_name_no_path_of_one_machine() -> None:
    home = re.compile(r"(?<![\w.$}])/(?:home|root|tmp|work|Users|mnt|opt)/\S*")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        found = home.findall(path.read_text(encoding="utf-8"))
        assert not found, f"{path.name} names {found}: a reader has other folders"


def test_the_default_folder_of_traces_stands_in_one_place() -> None:
    default = "/".join(["..", "shared", "traces"])  # in parts, so that this file is not a second place
    files = [*sources(*MOST_LINES), "Makefile", ".ci/run", "pyproject.toml"]
    assert [path for path in files if default in (ROOT / path).read_text(encoding="utf-8")] == ["tests/traces.py"]
