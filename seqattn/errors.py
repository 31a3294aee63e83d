"""The errors that seqattn and radix raise.

    SeqAttnError
    ├── NoPageError                      not enough free (and evictable) pages
    │   └── PromptTooLargeError          more pages than the whole cache has
    ├── BadValueError       ValueError   a value that can never be right
    │   ├── TokenError                   a token id that is not an int in [0, 2**31)
    │   ├── PageError                    a page number out of range, or free where it must be in use
    │   ├── LengthError                  a token count, list length or indptr that does not fit
    │   ├── TensorError                  dtype, shape, device or layout of a tensor
    │   ├── ConstantsError               a file of a device's constants that cannot be used
    │   ├── TraceError                   a line of a trace that cannot be read
    │   ├── ModelError                   a model that cannot be served from shared pages
    │   └── SessionError                 a session that is closed, or an id that is in use
    ├── SequenceIdError     KeyError, ValueError
    │   ├── UnknownSequenceError         no running sequence has this id
    │   └── DuplicateSequenceError       the id is in use already, or named twice in one call
    ├── SharedPageError                  a write to a page that others hold too
    ├── CaptureError                     a model whose decode step cannot be a CUDA graph
    ├── InvariantError                   `check()` found the state wrong: a bug, not a misuse
    └── MissingExtraError   ImportError  an optional dependency is not installed

Every message shows the offending value and says what to do. A call that raises leaves every structure as it was.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BadValueError",
    "CaptureError",
    "ConstantsError",
    "DuplicateSequenceError",
    "InvariantError",
    "LengthError",
    "MissingExtraError",
    "ModelError",
    "NoPageError",
    "PageError",
    "PromptTooLargeError",
    "SeqAttnError",
    "SequenceIdError",
    "SessionError",
    "SharedPageError",
    "TensorError",
    "TokenError",
    "TraceError",
    "UnknownSequenceError",
]


class SeqAttnError(Exception):
    """Root of every error that seqattn and radix raise on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as it is: the classes below take arguments from which they make a message."""
        return _rebuild, (type(self), self.args, vars(self))


def _rebuild(kind: type[SeqAttnError], args: tuple[object, ...], attributes: dict[str, object]) -> SeqAttnError:
    """An error as it was pickled, without running its `__init__` again."""
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class NoPageError(SeqAttnError):
    """More pages were needed than can be had.

    Attributes:
        needed: pages that the call needed beyond those it shares.
        available: pages that were free, or that could have been freed by eviction.
    """

    def __init__(self, needed: int, available: int, hint: str = "release or finish sequences first") -> None:
        self.needed = needed
        self.available = available
        super().__init__(f"{needed} pages needed, {available} available: {hint}")


class PromptTooLargeError(NoPageError):
    """A sequence that would not fit even in an empty cache; waiting does not help."""

    def __init__(self, needed: int, num_pages: int) -> None:
        super().__init__(needed, num_pages, "the whole cache is smaller than this; shorten the prompt or add pages")


class BadValueError(SeqAttnError, ValueError):
    """A value that can never be right, whatever the state."""


class TokenError(BadValueError):
    """A token id that is not an integer in [0, 2**31)."""


class PageError(BadValueError):
    """A page number out of range, or a page that is free where one in use is needed."""


class LengthError(BadValueError):
    """A token count, the length of a list or an indptr that does not fit."""


class TensorError(BadValueError):
    """A tensor of the wrong dtype, shape, device or layout."""


class ConstantsError(BadValueError):
    """A file of a device's constants is broken, or made by another version or for another device."""


class TraceError(BadValueError):
    """A line of a trace that cannot be read; `line` is its number, from 1."""

    def __init__(self, path: str, line: int, problem: str) -> None:
        self.path = path
        self.line = line
        super().__init__(f"{path}, line {line}: {problem}")


class ModelError(BadValueError):
    """A model that cannot be served from shared pages: `model` is its class or a layer's, `reason` what it has."""

    def __init__(self, model: str, reason: str) -> None:
        self.model = model
        self.reason = reason
        super().__init__(
            f"{model} cannot be served, as it has {reason}: "
            "serve a decoder-only model whose layers attend to all earlier tokens"
        )


class SessionError(BadValueError):
    """A conversation that is used after it was closed, or an id that belongs to another one."""


class SequenceIdError(SeqAttnError, KeyError, ValueError):
    """A sequence id that does not fit the call; a KeyError and a ValueError, as seqattn 0.0.2 raised either."""

    def __str__(self) -> str:
        """The message itself: a plain KeyError would print its repr."""
        return str(self.args[0])


class UnknownSequenceError(SequenceIdError):
    """No running sequence has this id."""

    def __init__(self, seq_id: object) -> None:
        self.seq_id = seq_id
        super().__init__(f"sequence id {seq_id!r} is not running: allocate or start it first")


class DuplicateSequenceError(SequenceIdError):
    """The id is in use already, or it is named twice in one call."""

    def __init__(self, seq_id: object, problem: str = "is running already: release it first or use another id") -> None:
        self.seq_id = seq_id
        super().__init__(f"sequence id {seq_id!r} {problem}")


class SharedPageError(SeqAttnError):
    """A write to a page that others hold too; `page` is its number."""

    def __init__(self, page: int, ref_count: int) -> None:
        self.page = page
        self.ref_count = ref_count
        super().__init__(
            f"page {page} has {ref_count} references and cannot be written: "
            "extend the sequence through its descriptor, which copies a shared page first"
        )


class CaptureError(SeqAttnError):
    """A model whose decode step cannot be captured in a CUDA graph; `model` is its class, `reason` what was raised."""

    def __init__(self, model: str, reason: str) -> None:
        self.model = model
        self.reason = reason
        super().__init__(
            f"a decode step of {model} cannot be captured in a CUDA graph: {reason}: serve it with graph_sizes='auto'"
        )


class InvariantError(SeqAttnError):
    """`check()` found the state wrong; `name` is the invariant's number (`P2`, `T4`, …)."""

    def __init__(self, name: str, problem: str, drawing: str = "") -> None:
        self.name = name
        super().__init__(f"{name}: {problem}" + (f"\n{drawing}" if drawing else ""))


class MissingExtraError(SeqAttnError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, extra: str, package: str) -> None:
        self.extra = extra
        super().__init__(f"{package} is not installed: pip install 'seqattn[{extra}]'")
