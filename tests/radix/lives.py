"""Lives as text: `start 0 [5,6,7] in b · extend 0 [8] · finish 0`.

A call is its name, then its arguments in order: ids and counts as numbers, tokens in brackets. A namespace follows its
tokens after `in`; `uncached 0` is `min_uncached_tokens=0`, `demote 3 [5,6,7,8]` is `after=3`. Failures are printed in
this form and can be pasted into a test.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

Call = tuple[Any, ...]
Tokens = tuple[int, ...]
Item = tuple[int, Tokens, Hashable]


def parsed(life: str) -> list[Call]:
    """The calls of a life."""
    return [_parsed_call(text.split()) for text in life.split("·") if text.strip()]


def described(call: Call) -> str:
    """The call as text."""
    name, args = call[0], call[1:]
    if name == "start":
        return f"start {_described_item(args[0], args[1], args[2])}{_described_uncached(args[3])}"
    if name == "start_many":
        return " ".join(["start_many", *(_described_item(*item) for item in args[0])]) + _described_uncached(args[1])
    if name == "extend":
        return " ".join(["extend", *(f"{seq_id} {_bracketed(tokens)}" for seq_id, tokens in args[0])])
    if name == "match":
        return f"match {_bracketed(args[0])}{_described_namespace(args[1])}"
    if name in ("pin", "hold", "demote"):
        return f"{name} {_described_item(*args)}"
    return " ".join([name, *(str(arg) for arg in args if arg is not None)])


def _described_item(seq_id: int, tokens: Tokens, namespace: Hashable) -> str:
    return f"{seq_id} {_bracketed(tokens)}{_described_namespace(namespace)}"


def _described_namespace(namespace: Hashable) -> str:
    return "" if namespace is None else f" in {namespace}"


def _described_uncached(count: int) -> str:
    return "" if count == 1 else f" uncached {count}"


def _bracketed(tokens: Tokens) -> str:
    return f"[{','.join(map(str, tokens))}]"


def _parsed_call(words: list[str]) -> Call:
    name, words = words[0], words[1:]
    if name in ("start", "start_many"):
        uncached = int(words.pop()) if words[-2:-1] == ["uncached"] else 1
        items = _parsed_items([word for word in words if word != "uncached"])
        return (name, *items[0], uncached) if name == "start" else (name, items, uncached)
    if name == "extend":
        return name, tuple((seq_id, tokens) for seq_id, tokens, _ in _parsed_items(words))
    if name == "match":
        return (name, *_parsed_items(["0", *words])[0][1:])
    if name in ("pin", "hold", "demote"):
        return (name, *_parsed_items(words)[0])
    args: list[int | None] = [int(word) for word in words]
    return (name, *args, *[None] * (name in ("publish", "finish") and len(args) == 1))


def _parsed_items(words: list[str]) -> tuple[Item, ...]:
    """`0 [5,6] in b 1 [7]` as (0, (5, 6), "b"), (1, (7,), None)."""
    items: list[Item] = []
    while words:
        seq_id, tokens, words = int(words[0]), words[1], words[2:]
        namespace = None
        if words[:1] == ["in"]:
            namespace, words = words[1], words[2:]
        items.append((seq_id, tuple(int(token) for token in tokens.strip("[]").split(",") if token), namespace))
    return tuple(items)
