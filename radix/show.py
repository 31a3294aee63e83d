"""The tree as text and as HTML.

namespace None
  ├── [5 6 7 8 9 … 4] 12 tokens · pages 0 1 2 · held by 2 · used at 7
  │   ├── [1 1 2] 3 tokens · page 3 · idle · used at 4
  │   └── [2 2 2 2] 4 tokens · page 9 · held by 1 · used at 7
  └── [8] 1 token · page 4 · idle · used at 2
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from radix.tokens import token_ids

if TYPE_CHECKING:
    from radix.node import Node
    from radix.tree import RadixTree

__all__ = ["MOST_LINES", "draw", "draw_html"]

Decode: TypeAlias = Callable[[list[int]], str]

#: lines of the drawing in an error: enough to see what is there, where the whole tree would be megabytes
MOST_LINES = 100

_MOST = 8


def draw(tree: RadixTree, *, decode: Decode | None = None, most_lines: int | None = None) -> str:
    """The tree as text, one edge a line, children in key order.

    Args:
        tree: what to draw.
        decode: turns token ids into text; None shows the ids.
        most_lines: how many lines to draw; a last one says how many edges are left out. None for all.
    """
    drawn = list(islice(_rows(tree), most_lines))
    lines = [start if node is None else start + describe(node, decode) for start, node in drawn]
    num_left = sum(1 for _ in tree) - sum(node is not None for _, node in drawn)
    if num_left:
        lines.append(f"… and {num_left:,} more edge{'s' * (num_left != 1)}")
    return "\n".join(lines) or "(empty)"


def _rows(tree: RadixTree) -> Iterator[tuple[str, Node | None]]:
    """How each line begins, and the node that it describes: none in the line of a namespace."""
    for root in tree.roots.values():
        yield f"namespace {root.namespace!r}", None
        stack = _children(root, "")
        while stack:
            node, indent, is_last = stack.pop()
            yield indent + ("└── " if is_last else "├── "), node
            stack += _children(node, indent + ("    " if is_last else "│   "))


def _children(node: Node, indent: str) -> list[tuple[Node, str, bool]]:
    """The children in reverse, for a stack, with their indent and whether each is the last of its siblings."""
    kids = sorted(node, key=_first_tokens)[::-1]
    return [(kid, indent, index == 0) for index, kid in enumerate(kids)]


def _first_tokens(node: Node) -> bytes:
    return node.key


def describe(node: Node, decode: Decode | None = None) -> str:
    """One edge in words: its tokens (long runs shortened), pages, holders and last use."""
    tokens = token_ids(node.key).tolist()
    text = repr(decode(tokens)) if decode else f"[{_shorten(tokens)}]"
    count = f"{len(tokens)} token{'s' * (len(tokens) != 1)}"
    pages = f"page{'s' * (node.num_pages != 1)} {_shorten(node.page_ids.tolist())}"
    state = f"held by {node.num_holders}" if node.num_holders else "idle"
    return f"{text} {count} · {pages} · {state} · used at {node.stamp}"


def _shorten(numbers: list[int]) -> str:
    """The numbers with the middle left out when there are more than eight."""
    if len(numbers) > _MOST:
        return " ".join(map(str, numbers[:5])) + " … " + str(numbers[-1])
    return " ".join(map(str, numbers))


def draw_html(tree: RadixTree, *, decode: Decode | None = None) -> str:
    """The whole tree as one HTML page that needs nothing else; subtrees fold.

    Args:
        tree: what to draw.
        decode: turns token ids into text; None shows the ids.
    """
    out: list[str] = [_HEAD]
    for root in tree.roots.values():
        out.append(f"<h2>namespace {html.escape(repr(root.namespace))}</h2>")
        stack: list[Node | str] = []
        stack += sorted(root, key=_first_tokens)[::-1]
        while stack:
            node = stack.pop()
            if isinstance(node, str):
                out.append(node)
                continue
            state = "held" if node.num_holders else "idle"
            out.append(f'<details open class="{state}"><summary>{html.escape(describe(node, decode))}</summary>')
            stack.append("</details>")
            stack += sorted(node, key=_first_tokens)[::-1]
    return "\n".join([*out, "</body></html>"])


_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>radix tree</title><style>
body { font: 14px/1.6 ui-monospace, monospace; margin: 2em; color: #222; background: #fff }
details { margin-left: 1.2em; border-left: 2px solid #ddd; padding-left: .6em }
.held > summary { color: #0b5394 } .idle > summary { color: #777 }
</style></head><body><h1>radix tree</h1>"""
