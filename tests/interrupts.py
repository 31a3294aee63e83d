"""Interrupts at any line of some files, as Ctrl-C may come there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["interrupted"]


class _InterruptError(BaseException):
    """As what Ctrl-C raises."""


def interrupted(call: Callable[[], object], line: int, files: tuple[str, ...]) -> bool:
    """Calls, interrupted at the nth line of files whose names end so; False if it has fewer."""
    count = 0

    def trace(frame: FrameType, event: str, _arg: object) -> Any:  # noqa: ANN401  as sys.settrace has it
        nonlocal count
        if not frame.f_code.co_filename.endswith(files):
            return None
        count += event == "line"
        if count == line and event == "line":
            raise _InterruptError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except _InterruptError:
        return True
    finally:
        sys.settrace(before)
    return False
