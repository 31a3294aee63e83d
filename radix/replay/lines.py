"""A trace file line by line: opened whatever its compression, each line a JSON object whose fields are checked.

Whatever is wrong becomes a `TraceError` with the file, the number of the line and the value: a trace of a million
lines with one bad one is a common thing, and a traceback out of a JSON parser helps nobody to find it.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from seqattn.errors import TraceError

__all__ = ["PathLike", "Record", "read_records"]

PathLike: TypeAlias = str | os.PathLike[str]

#: values longer than this are cut in messages.
_SHOWN_CHARS = 60


@attrs.frozen
class Record:
    """A JSON object of a trace and where it stands.

    Attributes:
        path: the file, as messages show it.
        line: number of the line, from 1.
        fields: the object.
        where: path inside the line with its dot (`requests[3].`), empty for the line itself.
    """

    path: str
    line: int
    fields: dict[str, Any]
    where: str = ""

    def error(self, problem: str) -> TraceError:
        """The error to raise about this line."""
        return TraceError(self.path, self.line, problem)

    def count(self, name: str, least: int = 0) -> int:
        """An integer field of at least `least`."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(name, value, f"an integer of at least {least}")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def text(self, name: str) -> str:
        """A field that is a string of Unicode characters."""
        value = self._get(name)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def integers(self, name: str) -> list[int]:
        """A list of integers, each at least 0."""
        value = self._get(name)
        # `set(map(type, …))` runs in C: these lists hold millions of hash ids.
        if not isinstance(value, list) or not set(map(type, value)) <= {int} or (value and min(value) < 0):
            raise self._wrong(name, value, "a list of integers of at least 0")
        return value

    def records(self, name: str) -> list[Record]:
        """A list of JSON objects."""
        value = self._get(name)
        if not isinstance(value, list) or not set(map(type, value)) <= {dict}:
            raise self._wrong(name, value, "a list of objects")
        return [attrs.evolve(self, fields=item, where=f"{self.where}{name}[{i}].") for i, item in enumerate(value)]

    def _get(self, name: str) -> object:
        if name not in self.fields:
            raise self.error(f"the field {self.where + name!r} is missing; there are {_shown(sorted(self.fields))}")
        return self.fields[name]

    def _wrong(self, name: str, value: object, wanted: str) -> TraceError:
        return self.error(f"{self.where + name!r} must be {wanted}, not {_shown(value)}")


def read_records(path: PathLike) -> Iterator[Record]:
    """Yields a record for each line of a .gz, .xz or plain file; blank lines are skipped.

    Raises:
        TraceError: a line that is not a JSON object, or a compressed file that is broken.
        OSError: the file cannot be opened.
    """
    name, line = os.fspath(path), 0
    with _open(name) as file:
        while True:
            line += 1
            try:
                text = file.readline()
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise TraceError(name, line, f"the file cannot be read on from here ({error})") from error
            if not text:
                return
            if not text.isspace():
                yield Record(name, line, _parse(name, line, text))


def _open(name: str) -> BufferedIOBase:
    if name.endswith(".gz"):
        return gzip.open(name, "rb")
    if name.endswith(".xz"):
        return lzma.open(name, "rb")
    return Path(name).open("rb")


def _parse(name: str, line: int, text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode("utf-8-sig"))  # json itself would guess UTF-16 or UTF-32 from the first bytes
    except UnicodeDecodeError as error:
        raise TraceError(name, line, f"not UTF-8 ({error.reason}): {_shown(text.strip())}") from error
    except (ValueError, RecursionError) as error:
        raise TraceError(name, line, f"not JSON ({error}): {_shown(text.strip())}") from error
    if not isinstance(fields, dict):
        raise TraceError(name, line, f"a request must be a JSON object, not {_shown(fields)}")
    return fields


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
