"""The tree of errors is the one that is drawn, and each error says what its handler needs."""

from __future__ import annotations

import builtins
import inspect
import pickle
import textwrap

import pytest

from seqattn import errors
from seqattn.errors import (
    CaptureError,
    DuplicateSequenceError,
    InvariantError,
    MissingExtraError,
    NoPageError,
    PromptTooLargeError,
    SeqAttnError,
    SharedPageError,
    TraceError,
    UnknownSequenceError,
)

BUILTINS = {name for name, value in vars(builtins).items() if inspect.isclass(value) and issubclass(value, Exception)}


def drawn_bases() -> dict[str, list[str]]:
    """From the drawing in the module's docstring: the bases of each class, the one that it hangs from first.

    A name stands four columns further right than the one it hangs from; builtin bases stand beside it:

        SeqAttnError
        ├── BadValueError       ValueError   a value that can never be right
        │   ├── TokenError                   …
    """
    assert errors.__doc__
    bases: dict[str, list[str]] = {}
    above: list[str] = []
    for line in textwrap.dedent(errors.__doc__.split("\n\n")[1]).splitlines():
        depth = len(line) - len(line.lstrip("│├└─ "))
        name, *beside = line[depth:].replace(",", " ").split()
        del above[depth // 4 :]
        above.append(name)
        bases[name] = [above[-2] if depth else "Exception", *(b for b in beside if b in BUILTINS)]
    return bases


def classes() -> dict[str, type]:
    """Every class that the module defines, exported or not."""
    own = (value for value in vars(errors).values() if getattr(value, "__module__", "") == errors.__name__)
    return {value.__name__: value for value in own if inspect.isclass(value)}


#: one of each class that takes more than a message, and every attribute that it shows
EXAMPLES: list[tuple[SeqAttnError, dict[str, object]]] = [
    (NoPageError(3, 2), {"needed": 3, "available": 2}),
    (PromptTooLargeError(9, 4), {"needed": 9, "available": 4}),
    (TraceError("trace.jsonl", 7, "no field 'hash_ids'"), {"path": "trace.jsonl", "line": 7}),
    (CaptureError("Llama", "it looks"), {"model": "Llama", "reason": "it looks"}),
    (UnknownSequenceError("chat 1"), {"seq_id": "chat 1"}),
    (DuplicateSequenceError((5, 2)), {"seq_id": (5, 2)}),
    (SharedPageError(11, 2), {"page": 11, "ref_count": 2}),
    (InvariantError("T4", "recency increases going down", "root ─ a"), {"name": "T4"}),
    (MissingExtraError("chat", "transformers"), {"extra": "chat"}),
]


def test_the_drawing_names_every_class_and_no_other() -> None:
    assert set(drawn_bases()) == set(classes()) == set(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_each_class_hangs_where_it_is_drawn(name: str) -> None:
    assert [base.__name__ for base in classes()[name].__bases__] == drawn_bases()[name]


@pytest.mark.parametrize(("error", "shown"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_the_attributes_hold_the_offending_values_and_the_message_shows_them(
    error: SeqAttnError, shown: dict[str, object]
) -> None:
    for name, value in shown.items():
        assert getattr(error, name) == value
        assert str(value) in str(error)


@pytest.mark.parametrize("error", [UnknownSequenceError("chat 1"), DuplicateSequenceError("chat 1")])
def test_an_error_about_an_id_is_caught_as_either_builtin_and_prints_no_repr(error: SeqAttnError) -> None:
    assert isinstance(error, KeyError)
    assert isinstance(error, ValueError)
    assert str(error).startswith("sequence id 'chat 1' is ")


def test_a_prompt_larger_than_the_cache_is_caught_where_pages_are_short() -> None:
    with pytest.raises(NoPageError, match="9 pages needed, 4 available: the whole cache is smaller"):
        raise PromptTooLargeError(9, 4)


def test_a_missing_extra_is_an_import_error_that_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"pip install 'seqattn\[chat\]'"):
        raise MissingExtraError("chat", "transformers")


def test_a_broken_invariant_shows_its_number_first_and_the_drawing_last() -> None:
    assert str(InvariantError("P2", "page 3 is free", "[3]")) == "P2: page 3 is free\n[3]"
    assert str(InvariantError("P2", "page 3 is free")) == "P2: page 3 is free"


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_between_two_processes(error: SeqAttnError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
