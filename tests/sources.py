"""The project's own source files, for tests that read them."""

from __future__ import annotations

import ast

from tests.traces import ROOT

__all__ = ["ROOT", "parse", "sources"]


def sources(*folders: str) -> list[str]:
    """Paths of the Python files in these folders, relative to the project, sorted."""
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: str) -> ast.Module:
    """The syntax tree of one of them."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)
