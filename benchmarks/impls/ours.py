"""seqattn + radix through its public methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import seqattn
from radix import PrefixCache
from radix.tokens import as_key
from seqattn import PageAllocator

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from benchmarks.workload import Ids
    from radix import PrefixMatch

    Prompt = npt.NDArray[np.int32]

__all__ = ["Ours", "OursWholePages", "OursWithHistory"]


class Ours:
    """A prefix cache over a bare allocator: page numbers are real, KV memory is not there."""

    whole_pages = False
    #: evictions that `explain` can look back on; the peers keep no such record
    history = 0
    package = f"seqattn {seqattn.__version__}"
    #: the module whose `CacheDescriptor` and `PagedKVCacheManager` are measured
    seqattn = seqattn
    #: a prompt in any form → the tree's key
    convert = staticmethod(as_key)

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.cache = PrefixCache(
            PageAllocator(num_pages, page_size), whole_pages=self.whole_pages, history=self.history
        )
        self.page_size = page_size
        # Bound methods of the library, so that nothing of the benchmark is timed.
        self.match, self.evict_pages = self.cache.match, self.cache.evict

    # -- not timed ------------------------------------------------------------------------------------------------

    @staticmethod
    def prompt(ids: Ids) -> Prompt:
        """What this scheduler holds: int32 in numpy, freshly written."""
        return ids.astype(np.int32)

    @staticmethod
    def copy(prompt: Prompt) -> Prompt:
        """The same prompt, freshly written."""
        return prompt.copy()

    def put(self, prompt: Prompt) -> None:
        """Caches a prompt and lets go of it."""
        self.cache.start(0, prompt)
        self.cache.finish(0)

    def put_in_chunks(self, prompt: Prompt, chunk: int) -> None:
        """Caches a prompt as chunked prefill does."""
        self.cache.start(0, prompt[:chunk])
        for begin in range(chunk, len(prompt), chunk):
            self.cache.publish(0)
            self.cache.extend([0], [prompt[begin : begin + chunk]])
        self.cache.finish(0)

    @staticmethod
    def matched(result: PrefixMatch) -> tuple[int, int]:
        """Tokens of a match, and pages or slots handed out for them."""
        return result.num_tokens, len(result.pages)

    @property
    def num_idle_pages(self) -> int:
        """Pages that eviction could free."""
        return self.cache.num_reclaimable_pages

    # -- timed ----------------------------------------------------------------------------------------------------

    def new_entry(self, ids: Ids, first_page: int) -> tuple[Prompt, npt.NDArray[np.int32]]:
        """What `insert` takes: tokens, and the pages that hold them."""
        return self.prompt(ids), np.arange(first_page, first_page + len(ids) // self.page_size, dtype=np.int32)

    def insert(self, entry: tuple[Prompt, npt.NDArray[np.int32]]) -> None:
        """Puts a prompt of whole pages in the tree; what `finish` does with pages that the tree does not have."""
        tokens, pages = entry
        self.cache.tree.insert(as_key(tokens), pages.tobytes())

    def new_request(self, ids: Ids) -> Prompt:
        """What `request` takes."""
        return self.prompt(ids)

    def request(self, prompt: Prompt) -> None:
        """A whole request without a reply."""
        self.cache.start(0, prompt)
        self.cache.finish(0)

    def hold_and_release(self, prompt: Prompt) -> None:
        """What a request does with a cached conversation before and after it runs."""
        self.cache.start(0, prompt)
        self.cache.abort(0)

    def turn_of(self, prompt: Ids, reply: Ids) -> tuple[Prompt, Prompt]:
        """What `turn` takes."""
        return self.prompt(prompt), self.prompt(reply)

    def turn(self, turn: tuple[Prompt, Prompt]) -> None:
        """A whole request: match, share, fork the tail, allocate, evict; the reply; publish and let go."""
        self.cache.start(0, turn[0])
        self.cache.extend([0], [turn[1]])
        self.cache.finish(0)

    def steps_of(self, prompt: Ids, reply: Ids) -> tuple[Callable[[], object], ...]:
        """The three calls that `turn` makes."""
        cache, tokens, answer = self.cache, self.prompt(prompt), self.prompt(reply)
        return lambda: cache.start(0, tokens), lambda: cache.extend([0], [answer]), lambda: cache.finish(0)

    def turn_facts(self) -> dict[str, float]:
        """What the chat has shown beside its cost; raises if a page has been lost."""
        self.cache.check()
        stats = self.cache.stats
        return {
            "hit_rate": stats.num_hit_tokens / stats.num_query_tokens,
            "evicted_pages": stats.num_evicted_pages,
            "copied_tails": stats.num_forked_pages,
        }

    def give_back(self) -> None:
        """Evicted pages are free already."""

    def new_page(self, ids: Ids) -> Prompt:
        """What `allocate_one` takes: a prompt of one page."""
        return self.prompt(ids)

    def allocate_one(self, prompt: Prompt) -> None:
        """Starts a prompt of one page in a full cache: looks it up, evicts a page, hands it out."""
        self.cache.start(0, prompt)

    def new_growth(self, prompt: Prompt, ids: Ids) -> Prompt:  # noqa: ARG002  vLLM grows its request
        """What `extend_one` takes: a page more for what `allocate_one` began."""
        return self.prompt(ids)

    def extend_one(self, tokens: Prompt) -> None:
        """Evicts a page and appends it to a running sequence."""
        self.cache.extend([0], [tokens])

    def end_one(self, prompt: Prompt) -> None:  # noqa: ARG002  vLLM wants its request back
        """Ends the request that `allocate_one` began; it stays cached."""
        self.cache.finish(0)

    def abort_one(self, prompt: Prompt) -> None:  # noqa: ARG002  as above
        """Ends it without caching it."""
        self.cache.abort(0)


class OursWholePages(Ours):
    """The same, sharing whole pages only, as the peers do."""

    whole_pages = True


class OursWithHistory(Ours):
    """The same, with the history of evictions that a cache has by default."""

    history = 1024
