"""What a prefix cache knows of running sequences, pins and lookups."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from attrs import define

from radix.tokens import TOKEN_BYTES
from seqattn.sequence import SequenceData

if TYPE_CHECKING:
    from radix.node import Node
    from radix.tree import Path
    from seqattn.pages import PageArray, PageIndex

_INT32 = np.dtype(np.int32)

__all__ = ["Pin", "PrefixMatch", "Running", "Started"]


@define(slots=True, eq=False)
class PrefixMatch:
    """The longest cached prefix of some tokens; holds no reference, so it is true until the cache changes.

        page_size 4, cached: a b c d | e f g h | i j      query: a b c d e f g x
                             page 7    page 2                num_tokens 7, pages [7], tail_page 2, tail_len 3

    Attributes:
        num_tokens: tokens that match.
        pages: full pages of the match, int32, read-only.
        tail_page: the page that holds the match's last `tail_len` tokens, None if the match ends with a full page.
        tail_len: tokens of the match in `tail_page`.
    """

    num_tokens: int
    pages: PageArray
    tail_page: int | None
    tail_len: int


class Started(NamedTuple):
    """What `PrefixCache.start` reused.

    Attributes:
        num_cached_tokens: tokens whose KV need not be computed.
        num_shared_pages: full pages shared with the tree.
        forked: `(src_page, dst_page, num_slots)` of the copied tail page, None if no tail was copied.
    """

    num_cached_tokens: int
    num_shared_pages: int
    forked: tuple[int, int, int] | None


#: `Started` of a tuple of its three fields, without the cost of naming them
started: Callable[[tuple[int, int, tuple[int, int, int] | None]], Started] = partial(tuple.__new__, Started)


class Running(SequenceData):
    """A running sequence: its page table, its tokens, and what it holds of the tree.

    Args:
        table: its page table's buffer, int32, not copied.
        num_pages: entries of the buffer in use.
        last_page_len: tokens in the last page.
        namespace: under which it matched and will publish.
        prompt: the tokens it was started with, as a key.

    Attributes:
        tail: the tokens added since.
        node: the deepest node whose pages it holds; None if it holds none.
        num_tree_pages: its leading pages that are the tree's: where `node` ends.
        may_end_shared: `truncate` has cut it inside a page, which others may hold too.
        held: index of its first pages, made when they were held; right as long as there are `num_tree_pages` of them:
            whoever takes one of these pages away sets it to None.
        request: the prompt as it was given, whatever was cut since; None for a fork, which is no request of its own.
        is_detached: started before a `clear`: it publishes nothing.
    """

    __slots__ = (
        "held",
        "is_detached",
        "may_end_shared",
        "namespace",
        "node",
        "num_tree_pages",
        "prompt",
        "request",
        "tail",
    )

    def __init__(
        self, table: PageArray, num_pages: int, last_page_len: int, namespace: Hashable, prompt: bytes
    ) -> None:
        self._buffer = table
        self.num_pages = num_pages
        self.last_page_len = last_page_len
        self.table = table[:num_pages]
        self.mark = None
        self.namespace = namespace
        self.prompt = prompt
        self.request: bytes | None = prompt
        self.tail = bytearray()
        self.node: Node | None = None
        self.num_tree_pages = 0
        self.held: PageIndex | None = None
        self.is_detached = False
        self.may_end_shared = False

    @classmethod
    def of(cls, num_pages: int, page_size: int, namespace: Hashable, prompt: bytes) -> Running:
        """A sequence whose page table, with room to grow, is still to be written."""
        table = np.empty(num_pages + num_pages // 8 + 8, _INT32)
        num_tokens = len(prompt) // TOKEN_BYTES
        return cls(table, num_pages, num_tokens - (num_pages - 1) * page_size, namespace, prompt)

    @property
    def tree_pages(self) -> PageIndex:
        """Its pages that are the tree's, as an index."""
        held, count = self.held, self.num_tree_pages
        return held if held is not None and len(held) == count else self.table[:count].astype(np.intp)

    @property
    def num_ids(self) -> int:
        """Token ids of the prompt and those added since."""
        return (len(self.prompt) + len(self.tail)) // TOKEN_BYTES

    def key(self, num_tokens: int, first: int = 0) -> bytes:
        """Its tokens from `first` up to `num_tokens` as a key; O(what comes back)."""
        begin, end, prompt, tail = first * TOKEN_BYTES, num_tokens * TOKEN_BYTES, self.prompt, self.tail
        size = len(prompt)
        if end <= size:
            return prompt[begin:end]
        if begin >= size:
            return bytes(tail[begin - size : end - size])
        return prompt[begin:] + (tail if end == size + len(tail) else tail[: end - size])

    def cut_tokens(self, num_tokens: int) -> None:
        """Forgets the tokens after the first `num_tokens`."""
        size = num_tokens * TOKEN_BYTES
        del self.tail[max(0, size - len(self.prompt)) :]
        self.prompt = self.prompt[:size]


@define(slots=True, eq=False)
class Pin:
    """A path that is kept: `node` is its deepest node, None once the tree was cleared; one reference to each page."""

    node: Node | None
    pages: PageArray


def match_of(path: Path, page_bytes: int) -> PrefixMatch:
    """A lookup's result in the words of the interface."""
    num_bytes, pages = path.num_bytes, np.frombuffer(path.pages, _INT32)
    num_tokens, num_full = num_bytes // TOKEN_BYTES, num_bytes // page_bytes
    if len(pages) == num_full:
        return PrefixMatch(num_tokens, pages, None, 0)
    tail = num_bytes % page_bytes
    return PrefixMatch(num_tokens, pages[:num_full], pages.item(num_full) if tail else None, tail // TOKEN_BYTES)
