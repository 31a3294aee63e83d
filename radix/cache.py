"""The prefix cache: running sequences that share what others have computed.

    start ──▶ extend ──▶ … ──▶ publish ──▶ … ──▶ finish          abort, truncate and fork in between
      │          │                │                │
      │          │                │                └─ the tree takes over the pages, tail included: now idle
      │          │                └─ the tree takes a reference to the full pages; the sequence keeps its own
      │          └─ pages for more tokens, evicting idle ones if none is free
      └─ match, share the full pages, copy the tail page, allocate the rest

Who holds what: a running sequence one reference to each page of its table, the tree one to each of its pages, a pin one
to each page it keeps. A page is idle when only the tree holds it; only idle pages are evicted.

Invariants (`check()`), beside those of the allocator (P), the descriptor (S) and the tree (T):

- C1 every page of the tree has a reference count of at least 1; the idle pages are those with a count of exactly 1.
- C2 holders never increase going down: whoever holds a page holds those before it.
- C3 free + held by sequences only + held by hand only + in the tree = all pages.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal

from radix import show
from radix.adopt import hand_over, publish
from radix.audit import check_cache
from radix.changing import amend_all, extend_all, extend_one, fork_one, let_go_after
from radix.demote import demote
from radix.explain import Explanation, explain
from radix.history import History
from radix.pin import Pinned
from radix.plan import Plan, plan_start
from radix.running import PrefixMatch, Running, Started, match_of
from radix.starting import start_all, start_one
from radix.state import State
from radix.tokens import TOKEN_BYTES, Tokens, as_key, check_rest, keys_of, unchecked_key, unchecked_view
from seqattn.counts import as_count
from seqattn.errors import (
    BadValueError,
    DuplicateSequenceError,
    LengthError,
    NoPageError,
    TokenError,
    UnknownSequenceError,
)
from seqattn.page_lists import concatenate

if TYPE_CHECKING:
    from radix.show import Decode
    from radix.stats import CacheStats
    from radix.tree import RadixTree
    from seqattn.descriptor import CacheDescriptor
    from seqattn.hybrid import CostModel
    from seqattn.packed import FlashInferHybridData, FlashInferPackedData
    from seqattn.pages import PageAllocator, PageArray, PageList

__all__ = ["PrefixCache"]


class PrefixCache:
    """Shares the KV of common token prefixes between sequences, and evicts what nobody uses.

    Public methods are atomic under one lock: any thread may call any of them; `manager` and `descriptor` are not under
    it. A call that raises leaves everything as it was. Sequences are changed only through this class, never through
    `descriptor`. KV is written, copied and read on one CUDA stream, or the caller orders the accesses: a freed page may
    be handed out again at once.

    Args:
        manager: where pages come from: a `PagedKVCacheManager`, or a `PageAllocator` to simulate without memory.
        policy: which idle pages go first; `"lru"` is the one there is.
        whole_pages: share full pages only and never fork a tail, as engines without token-exact reuse do.
        history: how many evictions `explain` can look back on, one for each edge that lost pages; 0 for none.

    Raises:
        BadValueError: an unknown policy.
        LengthError: a negative `history`.
    """

    def __init__(
        self,
        manager: PageAllocator,
        *,
        policy: Literal["lru"] = "lru",
        whole_pages: bool = False,
        history: int = 1024,
    ) -> None:
        if policy != "lru":
            raise BadValueError(f"policy {policy!r} is unknown: use 'lru'")
        self.manager = manager
        self.policy = policy
        self.whole_pages = whole_pages
        self.state = State(manager, History(as_count("history", history)))
        self.tree: RadixTree = self.state.tree
        self.descriptor: CacheDescriptor = self.state.descriptor
        self.lock = threading.RLock()

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> CacheStats:
        """Counters since the cache was made."""
        return self.state.stats

    @property
    def num_reclaimable_pages(self) -> int:
        """Pages that eviction could free now. O(1), but O(idle nodes) once `manager.ref` was called by hand."""
        with self.lock:
            return self.state.reserve.num_reclaimable()

    def match(self, tokens: Tokens, *, namespace: Hashable = None) -> PrefixMatch:
        """The longest cached prefix of `tokens`; changes nothing, not even recency.

        Args:
            tokens: token ids, integers in [0, 2**31).
            namespace: only what was cached under this value is seen.

        Raises:
            TokenError: not token ids.

        Cost: converting the tokens, plus one memory comparison of what matches.
        """
        query = unchecked_view(tokens)
        with self.lock:
            path = self.tree.match(query, namespace)
        if self.whole_pages:
            path.num_bytes -= path.num_bytes % self.tree.page_bytes
        if len(query) > path.num_bytes:
            check_rest(query, path.num_bytes)
        return match_of(path, self.tree.page_bytes)

    def explain(self, tokens: Tokens, *, namespace: Hashable = None, decode: Decode | None = None) -> Explanation:
        """Why so many of `tokens` are cached and no more; print the result, or read its attributes. Changes nothing.

        Args:
            tokens: token ids.
            namespace: where to look; others are told of if more matches there.
            decode: turns token ids into text, to see where the two sides part.

        Raises:
            TokenError: not token ids.

        Cost: that of `match` in every namespace, and a comparison with each record of the history, each running
        sequence and each branch where the two sides part: milliseconds, for a person who asks.
        """
        query = as_key(tokens)
        with self.lock:
            num_cached = self.tree.match(query, namespace).num_bytes // TOKEN_BYTES
            if self.whole_pages:
                num_cached -= num_cached % self.tree.page_size
            return explain(self.state, query, namespace, num_cached, decode)

    def can_start(self, tokens: Tokens, *, namespace: Hashable = None) -> bool:
        """Whether `start` with its default arguments would find pages now; changes nothing.

        False also for a prompt that will never fit, which `start` tells apart as `PromptTooLargeError`.

        Raises:
            TokenError: not token ids, or none.
        """
        key = unchecked_key(tokens)
        with self.lock:
            plan = self._plan(None, key, namespace, 1)
            try:
                self.state.reserve.fit([plan])
            except NoPageError:
                return False
            return True

    # -- starting -----------------------------------------------------------------------------------------------------

    def start(
        self, seq_id: Hashable, tokens: Tokens, *, namespace: Hashable = None, min_uncached_tokens: int = 1
    ) -> Started:
        """Starts a sequence: shares the cached full pages, copies the cached part of the next, allocates the rest.

        Args:
            seq_id: any hashable value that is not running.
            tokens: the prompt, at least one token.
            namespace: share only with what was cached under the same value (tenant, adapter, image hash, …).
            min_uncached_tokens: compute at least so many tokens of the prompt: a model needs one to go on from.

        Returns:
            What was reused; the caller computes the KV of the tokens after `num_cached_tokens`.

        Raises:
            TokenError: not token ids, or none.
            DuplicateSequenceError: `seq_id` is running.
            PromptTooLargeError: the prompt needs more pages than the whole cache has.
            NoPageError: the pages needed beyond the shared ones exceed those free or idle. Nothing is evicted then.

        The sequence holds a reference to each of its pages until `finish` or `abort`. If exactly the page is missing
        that the tail would be copied from, the tail is given up.

        Cost: converting and comparing the tokens once, O(pages) for references and table, O(nodes) for the path, plus
        the copy of at most one page.
        """
        key = unchecked_key(tokens)
        with self.lock:
            self._refuse_running(seq_id)
            limit = len(key) - TOKEN_BYTES * _uncached(key, min_uncached_tokens)
            return start_one(self.state, seq_id, key, namespace, limit, whole_pages=self.whole_pages)

    def start_many(
        self,
        seq_ids: Sequence[Hashable],
        prompts: Sequence[Tokens],
        *,
        namespaces: Sequence[Hashable] | None = None,
        min_uncached_tokens: int = 1,
    ) -> list[Started]:
        """Starts sequences, all or none, with one copy for all tails. They do not share what none has published yet.

        Raises:
            LengthError: lists of different lengths.
            DuplicateSequenceError: an id is running or named twice.
            TokenError, PromptTooLargeError, NoPageError: as `start` does; nothing has changed.

        Cost: that of each `start`.
        """
        names = [None] * len(seq_ids) if namespaces is None else namespaces
        if not len(seq_ids) == len(prompts) == len(names):
            raise LengthError(f"{len(seq_ids)} sequence ids, {len(prompts)} prompts and {len(names)} namespaces differ")
        keys = [unchecked_key(tokens) for tokens in prompts]
        with self.lock:
            self.descriptor.refuse_twice(seq_ids)
            for seq_id in seq_ids:
                self._refuse_running(seq_id)
            each = zip(seq_ids, keys, names, strict=True)
            plans = [self._plan(seq_id, key, name, min_uncached_tokens) for seq_id, key, name in each]
            return start_all(self.state, plans)

    def _plan(self, seq_id: Hashable, key: bytes, namespace: Hashable, min_uncached_tokens: int) -> Plan:
        max_cached = len(key) // TOKEN_BYTES - _uncached(key, min_uncached_tokens)
        plan = plan_start(self.tree, seq_id, key, namespace, max_cached=max_cached, whole_pages=self.whole_pages)
        check_rest(key, plan.path.num_bytes)
        return plan

    # -- running ------------------------------------------------------------------------------------------------------

    def extend(self, seq_ids: Sequence[Hashable], token_ids: Sequence[int | Tokens] | Tokens) -> None:
        """Appends tokens to running sequences, all or none: their KV is about to be computed.

        Args:
            seq_ids: each at most once.
            token_ids: for each sequence one token id, or a list or array of at least one. A flat array or tensor gives
                one to each, as `logits.argmax(-1)` does.

        Raises:
            UnknownSequenceError, DuplicateSequenceError: an id is not running, or named twice.
            TokenError, LengthError: not token ids, none for a sequence, or lists of different lengths.
            NoPageError: too few pages are free or idle; nothing has changed.

        A last page that is shared after a `truncate` inside it is copied first. The new pages are the sequences'.

        Cost: O(new tokens), about 0.5 µs for each sequence that needs no page, else 1.5.
        """
        keys = keys_of(token_ids)
        with self.lock:
            if len(seq_ids) == len(keys) == 1:
                (seq_id,) = seq_ids
                extend_one(self.state, seq_id, self._get(seq_id), keys[0])
                return
            for seq_id in seq_ids:
                self._get(seq_id)
            extend_all(self.state, seq_ids, keys)

    def amend(self, seq_ids: Sequence[Hashable], token_ids: Sequence[int] | Tokens) -> None:
        """Says what the last token of running sequences is, for who had to `extend` before that was known; all or none.

        Raises:
            UnknownSequenceError, DuplicateSequenceError: an id is not running, or named twice.
            TokenError, LengthError: not one token id for each; or a last token that is published, or of the prompt.

        Cost: about 0.5 µs for each sequence.
        """
        keys = keys_of(token_ids)
        with self.lock:
            amend_all(self.state, seq_ids, [self._get(seq_id) for seq_id in seq_ids], keys)

    def fork(self, seq_id: Hashable, new_seq_id: Hashable) -> None:
        """Starts a sequence with the same tokens: full pages are shared, the partly filled last page is copied.

        Raises:
            UnknownSequenceError: `seq_id` is not running.
            DuplicateSequenceError: `new_seq_id` is.
            NoPageError: the copy needs a page and none is free or idle; nothing has changed.

        The fork holds references of its own. Cost: O(tokens) for its page table and what was added to the prompt.
        """
        with self.lock:
            run = self._get(seq_id)
            self._refuse_running(new_seq_id)
            fork_one(self.state, run, seq_id, new_seq_id)

    def truncate(self, seq_id: Hashable, num_tokens: int) -> None:
        """Keeps the first `num_tokens` tokens; the pages after them are given back: a use of what they held.

        Allocates nothing: a cut inside a shared page keeps sharing it, and the next `extend` copies it first.

        Raises:
            UnknownSequenceError: `seq_id` is not running.
            LengthError: negative, or more tokens than the sequence has.

        Cost: O(pages given back), O(nodes) for the path.
        """
        with self.lock:
            run = self._get(seq_id)
            num_tokens = self.descriptor.check_cut(seq_id, num_tokens)
            let_go_after(self.state, run, -(-num_tokens // self.tree.page_size))
            self.descriptor.truncate(seq_id, num_tokens)
            run.cut_tokens(num_tokens)
            run.may_end_shared = num_tokens % self.tree.page_size > 0

    # -- ending -------------------------------------------------------------------------------------------------------

    def publish(self, seq_id: Hashable, *, num_tokens: int | None = None) -> None:
        """Puts the sequence's full computed pages in the tree while it runs, so that others can share them.

        Args:
            seq_id: a running sequence; it keeps its references. Where the tree has the same tokens already, it takes
                the tree's pages for its own: data packed before is void.
            num_tokens: tokens whose KV has been written; None for all.

        Raises:
            UnknownSequenceError: `seq_id` is not running.
            LengthError: `num_tokens` is negative, or more than the sequence has.

        Cost: linear in the tokens not yet published. After `clear`, sequences started before it publish nothing.
        """
        with self.lock:
            run = self._get(seq_id)
            num_tokens = run.num_ids if num_tokens is None else self.descriptor.check_cut(seq_id, num_tokens)
            num_full = num_tokens // self.tree.page_size
            if num_full and not run.is_detached:
                publish(self.state, run, num_full * self.tree.page_size)

    def finish(self, seq_id: Hashable, *, num_tokens: int | None = None) -> None:
        """Puts everything computed in the tree, the partly filled last page included, and ends the sequence.

        Args:
            seq_id: a running sequence; its references end, the tree takes over what it did not have.
            num_tokens: tokens whose KV has been written; None for all.

        Raises:
            UnknownSequenceError: `seq_id` is not running.
            LengthError: `num_tokens` is negative, or more than the sequence has.

        Cost: linear in the tokens not yet published, and O(pages) to give the references back.
        """
        with self.lock:
            run = self._get(seq_id)
            num_tokens = run.num_ids if num_tokens is None else self.descriptor.check_cut(seq_id, num_tokens)
            if self.whole_pages:
                num_tokens -= num_tokens % self.tree.page_size
            if num_tokens and not run.is_detached:
                own = hand_over(self.state, run, num_tokens)
            else:
                own = run.table[run.num_tree_pages :]
            self._end(seq_id, run, own)

    def abort(self, seq_id: Hashable) -> None:
        """Ends a sequence without publishing more of it; what it shared counts as used.

        Started again under the same id with a prompt that begins with the same tokens, it counts once in `stats`.
        Cost: O(pages).

        Raises:
            UnknownSequenceError: `seq_id` is not running.
        """
        with self.lock:
            run = self._get(seq_id)
            self.state.retries.remember(seq_id, run.namespace, run.request)
            self._end(seq_id, run, run.table[run.num_tree_pages :])

    def _end(self, seq_id: Hashable, run: Running, own: PageArray | None) -> None:
        """Forgets a sequence and gives its references back, those to `own` of the pages that are not the tree's."""
        if own is not None and len(own):
            self.manager.drop(own)
        if run.node is not None:
            self.manager.unhold(run.tree_pages)
            self.tree.release(run.node)
        self.descriptor.remove(seq_id)

    # -- keeping and forgetting ---------------------------------------------------------------------------------------

    def pin(self, tokens: Tokens, *, namespace: Hashable = None) -> Pinned:
        """A context manager that keeps what matches on entry, and yields the `PrefixMatch`.

        The partly matched last page is kept as well; a miss keeps nothing. Holds a reference to each page until the
        block is left, unless `clear` comes first. Cost: that of `match`, and O(pages).

        Raises:
            TokenError: not token ids.
        """
        return Pinned(self, as_key(tokens), namespace)

    def evict(self, num_pages: int) -> int:
        """Frees up to `num_pages` idle pages, least recently used first, leaves from their ends; returns how many.

        Raises:
            LengthError: a negative number, or not an integer.

        Cost: O(log siblings) for each node that goes, whatever the size of the tree.
        """
        num_pages = as_count("num_pages", num_pages)
        with self.lock:
            return self.state.reserve.evict(num_pages)

    def demote(self, tokens: Tokens, *, after: int, namespace: Hashable = None) -> int:
        """Lets what only `tokens` have beyond the first `after` be evicted first; returns how many pages that is.

        For what nobody will come back for: an answer that was taken back, the branches of best-of-n that lost. It stays
        cached until pages are short, goes before all that is idle now, and is like any other page once it is used.
        What others hold or continue is left alone, and so is the page that token `after` stands in, unless it begins
        with that token. What is kept of the path counts as used.

        Args:
            tokens: a cached prefix, up to its end; what follows that is not cached does not matter.
            after: how many tokens to leave as they are.
            namespace: where to look.

        Raises:
            TokenError: not token ids.
            LengthError: `after` is negative, or not an integer.

        Cost: that of `match`, and O(nodes).
        """
        key, after = as_key(tokens), as_count("after", after)
        with self.lock:
            return demote(self.tree, self.tree.match(key, namespace), -(-after // self.tree.page_size))

    def clear(self) -> None:
        """Forgets the whole tree, also what is in use: after new weights no cached KV is right.

        Running sequences keep their pages and publish nothing any more; pins hold nothing from now on. O(tree).
        """
        with self.lock:
            pages = concatenate(node.page_ids for node in self.tree)
            self.manager.drop(pages)
            for pin in self.state.pins:
                self.manager.drop(pin.pages)
                pin.node = None
            self.state.pins.clear()
            for run in self.state.running.values():
                run.node, run.num_tree_pages, run.held, run.is_detached = None, 0, None, True
            self.tree.clear()
            self.state.history.clear(self.tree.clock)

    # -- packing ------------------------------------------------------------------------------------------------------

    def pack_for_flashinfer(
        self, seq_ids: Sequence[Hashable], *, num_tokens: Sequence[int] | None = None
    ) -> FlashInferPackedData:
        """The page tables of a batch, not to be written to; see `CacheDescriptor.pack_for_flashinfer`.

        Void after the next `publish`.
        """
        with self.lock:
            return self.descriptor.pack_for_flashinfer(seq_ids, num_tokens=num_tokens)

    def pack_hybrid_for_flashinfer(
        self,
        seq_ids: Sequence[Hashable],
        *,
        query_lens: Sequence[int] | None = None,
        cost_model: CostModel | Literal["auto"] | None = None,
        num_tokens: Sequence[int] | None = None,
    ) -> FlashInferHybridData:
        """The batch as shared and unique levels; see `CacheDescriptor.pack_hybrid_for_flashinfer`."""
        with self.lock:
            return self.descriptor.pack_hybrid_for_flashinfer(
                seq_ids, query_lens=query_lens, cost_model=cost_model, num_tokens=num_tokens
            )

    # -- proof --------------------------------------------------------------------------------------------------------

    def check(self, outside: PageList | None = None) -> None:
        """Recomputes every invariant from scratch; O(pages + tree), and changes nothing.

        Args:
            outside: pages held by others (by hand, by another descriptor), one entry for each reference: the counts
                must be equal to what is known then. None: equal, unless the allocator knows of pages held by hand.

        Raises:
            InvariantError: naming the invariant, with the tree drawn.
        """
        with self.lock:
            check_cache(self.state, outside)

    def show(self, *, decode: Decode | None = None) -> str:
        """The tree as text, one edge a line; `decode` turns token ids into text. `show.draw_html` makes a page."""
        with self.lock:
            return show.draw(self.tree, decode=decode)

    def _get(self, seq_id: Hashable) -> Running:
        try:
            return self.state.running[seq_id]
        except (KeyError, TypeError):
            raise UnknownSequenceError(seq_id) from None

    def _refuse_running(self, seq_id: Hashable) -> None:
        try:
            running = seq_id in self.state.running
        except TypeError as error:
            raise BadValueError(f"seq_id must be hashable, not {seq_id!r}: {error}") from None
        if running:
            raise DuplicateSequenceError(seq_id)


def _uncached(key: bytes, num_tokens: int) -> int:
    """How many tokens of a prompt to compute at least; raises what `start` raises."""
    if not key:
        raise TokenError("an empty prompt cannot be started: give at least one token")
    return num_tokens if type(num_tokens) is int and num_tokens >= 0 else as_count("min_uncached_tokens", num_tokens)
