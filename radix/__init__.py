"""Prefix reuse for paged KV caches: a radix tree over token ids, above `seqattn`.

    prompt ──▶ RadixTree.match ──▶ pages to share, one page to fork ──▶ a running sequence ──▶ back into the tree
               tokens → pages      PrefixCache.start                    PrefixCache.extend     PrefixCache.finish

The life of a sequence:

    cache = PrefixCache(PagedKVCacheManager(...))     # or over a PageAllocator, for simulation
    started = cache.start("chat 1", prompt)           # shares the longest cached prefix; forks its tail page
    ...                                               # compute the KV of prompt[started.num_cached_tokens:]
    cache.extend(["chat 1"], [token_id])              # one more token, about to be computed
    cache.finish("chat 1")                            # everything computed becomes a prefix for others

Whole pages are shared by reference and never written; only the page in which a match ends is copied, so reuse is exact
to the token at any page size. What nobody uses is evicted when pages are short, least recently used first.

`Sessions` keep conversations cached while they last; `PrefixCache.explain` says why something was not found.

Importing radix does not load torch: each name below is imported from its file at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radix.cache import PrefixCache
    from radix.explain import Explanation
    from radix.guard import Break, RetokenisationWarning
    from radix.node import Node
    from radix.running import PrefixMatch, Started
    from radix.session import ChatSession
    from radix.session_store import Sessions
    from radix.stats import CacheStats
    from radix.tree import RadixTree

__all__ = [
    "Break",
    "CacheStats",
    "ChatSession",
    "Explanation",
    "Node",
    "PrefixCache",
    "PrefixMatch",
    "RadixTree",
    "RetokenisationWarning",
    "Sessions",
    "Started",
]

#: the file of every public name
_HOME = {
    "Break": "radix.guard",
    "CacheStats": "radix.stats",
    "ChatSession": "radix.session",
    "Explanation": "radix.explain",
    "Node": "radix.node",
    "PrefixCache": "radix.cache",
    "PrefixMatch": "radix.running",
    "RadixTree": "radix.tree",
    "RetokenisationWarning": "radix.guard",
    "Sessions": "radix.session_store",
    "Started": "radix.running",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  the type of a name is in the imports above
    if name not in _HOME:
        raise AttributeError(f"module 'radix' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return list(__all__)
