"""What the command lines of both packages have in common."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from seqattn.errors import MissingExtraError, SeqAttnError

if TYPE_CHECKING:
    from collections.abc import Callable

    import rich_click as click

__all__ = ["run_command"]


def run_command(name: str, application: Callable[[], click.RichGroup]) -> None:
    """Builds and runs a command line; an error of this project is one line on stderr and exit code 2.

    Args:
        name: what it is called by.
        application: builds all commands, once the extra `cli` is known to be there.
    """
    try:
        for package in ("rich", "rich_click"):
            _require(package)
        application()(prog_name=name)
    except SeqAttnError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  a command line prints
        sys.exit(2)


def _require(package: str) -> None:
    try:
        import_module(package)
    except ImportError as error:
        raise MissingExtraError("cli", package) from error
