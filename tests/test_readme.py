"""The README and the guides tell the truth: their programs run and print what is said, and links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
GUIDE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "chat.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS + GUIDE, ids=range(len(PROGRAMS + GUIDE)))
def test_a_program_of_the_documentation_prints_what_it_says(program: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "a program", "exec"), {})  # a new namespace for each, as a reader would have
    said = [line[2:] for line in program.splitlines() if line.startswith("# ")]
    assert printed.getvalue().splitlines() == said


def test_the_documentation_has_programs() -> None:
    assert len(PROGRAMS) >= 2
    assert len(GUIDE) >= 3


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_a_link_of_the_readme_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).is_file()


@pytest.mark.parametrize("name", re.findall(r"`(\w+\.py)`", README))
def test_an_example_named_in_the_readme_is_there(name: str) -> None:
    assert (ROOT / "examples" / name).is_file()
