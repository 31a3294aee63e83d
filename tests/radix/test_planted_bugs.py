"""A checker needs tests too: bugs are planted in the real code, one at a time, and each must be caught.

"Caught" means that within some random lives `check()` raises, or the cache differs from the model, or what its slots
remember is wrong. The lives are the same for all bugs, and pass when nothing is planted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from radix import adopt, cache, demote, reserve, starting
from radix.cache import PrefixCache
from radix.node import PAGE_ID_BYTES, Node
from radix.pin import Pinned
from radix.plan import Plan
from radix.tree import RadixTree
from seqattn.descriptor import CacheDescriptor
from seqattn.errors import NoPageError, SeqAttnError
from seqattn.growth import Growth
from seqattn.pages import PageAllocator
from tests.radix.driver import LifeError, random_life

NUM_LIVES, NUM_STEPS = 60, 150

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTS: dict[str, Plant] = {}


def bug(plant: Plant) -> Plant:
    PLANTS[plant.__name__] = plant
    return plant


def skipping(patch: pytest.MonkeyPatch, owner: Any, name: str, result: Any = None) -> None:  # noqa: ANN401  anything
    patch.setattr(owner, name, lambda *_args, **_kwargs: result)


# -- references -------------------------------------------------------------------------------------------------------


@bug
def a_shared_page_gets_no_reference(patch: pytest.MonkeyPatch) -> None:
    real = PageAllocator.hold
    patch.setattr(PageAllocator, "hold", lambda self, pages: real(self, pages[:-1]) if len(pages) > 1 else None)


@bug
def a_page_is_given_back_twice(patch: pytest.MonkeyPatch) -> None:
    real = PageAllocator.drop

    def drop(self: PageAllocator, pages: Any) -> int:  # noqa: ANN401
        freed = real(self, pages)
        return freed + real(self, pages[-1:]) if len(pages) > 2 and self.ref_count[pages[-1]] else freed

    patch.setattr(PageAllocator, "drop", drop)


@bug
def the_page_that_a_tail_replaces_keeps_the_reference_of_the_tree(patch: pytest.MonkeyPatch) -> None:
    real = adopt._replace

    def replace(state: Any, old_page: int, leaf: Node) -> None:  # noqa: ANN401
        real(state, old_page, leaf)
        state.manager.ref_count[old_page] += 1

    patch.setattr(adopt, "_replace", replace)


@bug
def a_pin_is_lost_when_its_page_is_replaced(patch: pytest.MonkeyPatch) -> None:
    real = adopt._replace

    def replace(state: Any, old_page: int, leaf: Node) -> None:  # noqa: ANN401
        pins, state.pins = state.pins, set()
        real(state, old_page, leaf)
        state.pins = pins

    patch.setattr(adopt, "_replace", replace)


@bug
def a_pin_forgets_the_partly_matched_page(patch: pytest.MonkeyPatch) -> None:
    real = Pinned.__enter__

    def enter(self: Pinned) -> Any:  # noqa: ANN401
        self._key = self._key[: len(self._key) // self._cache.tree.page_bytes * self._cache.tree.page_bytes]
        return real(self)

    patch.setattr(Pinned, "__enter__", enter)


@bug
def a_start_that_fails_has_evicted(patch: pytest.MonkeyPatch) -> None:
    real = reserve.Reserve.fit

    def fit(self: reserve.Reserve, plans: list[Plan]) -> Any:  # noqa: ANN401
        try:
            return real(self, plans)
        except NoPageError:
            self.evict(1)
            raise

    patch.setattr(reserve.Reserve, "fit", fit)


# -- adopting ---------------------------------------------------------------------------------------------------------


@bug
def forks_do_not_adopt(patch: pytest.MonkeyPatch) -> None:
    skipping(patch, adopt, "_sharers", [])


@bug
def only_one_fork_adopts(patch: pytest.MonkeyPatch) -> None:
    real = adopt._sharers
    patch.setattr(adopt, "_sharers", lambda *args: real(*args)[:1])


@bug
def nothing_is_adopted(patch: pytest.MonkeyPatch) -> None:
    """A page that the tree has already is given another reference, but the sequence keeps its own in its table."""
    real = adopt.put

    def put(state: Any, run: Any, num_tokens: int) -> Any:  # noqa: ANN401
        own = run.table.copy()
        done = real(state, run, num_tokens)
        done.pages = own[run.num_tree_pages :][: len(done.pages) // PAGE_ID_BYTES].tobytes()
        return done

    patch.setattr(adopt, "put", put)


# -- the tree ---------------------------------------------------------------------------------------------------------


@bug
def a_split_forgets_the_parent(patch: pytest.MonkeyPatch) -> None:
    real = RadixTree._split

    def split(self: RadixTree, node: Node, num_pages: int) -> Node:
        parent = node.parent
        upper = real(self, node, num_pages)
        node.parent = parent
        return upper

    patch.setattr(RadixTree, "_split", split)


@bug
def a_split_counts_a_holder_of_the_upper_half_twice(patch: pytest.MonkeyPatch) -> None:
    real = RadixTree._split

    def split(self: RadixTree, node: Node, num_pages: int) -> Node:
        upper = real(self, node, num_pages)
        if upper.num_holders:
            upper.num_holders += 1
        return upper

    patch.setattr(RadixTree, "_split", split)


@bug
def trimming_takes_the_head_of_an_edge(patch: pytest.MonkeyPatch) -> None:
    real = RadixTree.trim

    def trim(self: RadixTree, node: Node, count: int) -> None:
        if count < node.num_pages:
            pages = node.pages
            node.pages = pages[count * PAGE_ID_BYTES :] + pages[: count * PAGE_ID_BYTES]
        real(self, node, count)

    patch.setattr(RadixTree, "trim", trim)


@bug
def a_leaf_that_grew_is_not_filed_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RadixTree, "_rekey", lambda self, node, key: setattr(node, "key", key))


@bug
def a_tail_is_not_replaced_by_a_fuller_one(patch: pytest.MonkeyPatch) -> None:
    real = RadixTree._extend_leaf

    def extend_leaf(self: RadixTree, leaf: Node, *args: Any) -> Any:  # noqa: ANN401
        done = real(self, leaf, *args)
        done.replaced = None
        return done

    patch.setattr(RadixTree, "_extend_leaf", extend_leaf)


@bug
def the_namespace_is_dropped(patch: pytest.MonkeyPatch) -> None:
    match, insert = RadixTree.match, RadixTree.insert
    patch.setattr(RadixTree, "match", lambda self, key, namespace=None, **more: match(self, key, None, **more))
    patch.setattr(
        RadixTree, "insert", lambda self, key, pages, namespace=None, **m: insert(self, key, pages, None, **m)
    )


@bug
def a_match_goes_one_token_too_far(patch: pytest.MonkeyPatch) -> None:
    real = RadixTree.match

    def match(self: RadixTree, key: bytes, *args: Any, **more: Any) -> Any:  # noqa: ANN401
        path = real(self, key, *args, **more)
        if path.num_bytes % self.page_bytes and path.num_bytes < len(key):
            path.num_bytes += 4
        return path

    patch.setattr(RadixTree, "match", match)


@bug
def clear_forgets_nothing(patch: pytest.MonkeyPatch) -> None:
    skipping(patch, RadixTree, "clear")


# -- recency ----------------------------------------------------------------------------------------------------------


@bug
def the_page_that_a_tail_is_copied_from_is_not_stamped(patch: pytest.MonkeyPatch) -> None:
    skipping(patch, RadixTree, "stamp")


@bug
def letting_go_is_no_use(patch: pytest.MonkeyPatch) -> None:
    real = RadixTree.release

    def release(self: RadixTree, node: Node, *args: Any, **more: Any) -> None:  # noqa: ANN401
        was_idle = set(self.idle)
        real(self, node, *args, **more)
        for other in list(self.idle)[::-1]:
            if other not in was_idle:
                self.idle.move_to_end(other, last=False)

    patch.setattr(RadixTree, "release", release)


@bug
def a_stamp_leaves_the_place_in_the_queue_as_it_was(patch: pytest.MonkeyPatch) -> None:
    def stamp_from(self: RadixTree, node: Node | None) -> None:
        while node is not None and node.parent is not None:
            node.stamp = self.clock
            node = node.parent

    patch.setattr(RadixTree, "_stamp_from", stamp_from)


@bug
def the_newest_page_goes_first(patch: pytest.MonkeyPatch) -> None:
    real = RadixTree.victims

    def victims(self: RadixTree, *args: Any) -> Any:  # noqa: ANN401
        leaves = [node for node in self.idle if node.children is None]
        if len(leaves) > 1:
            self.idle.move_to_end(leaves[-1], last=False)
        return real(self, *args)

    patch.setattr(RadixTree, "victims", victims)


@bug
def what_others_continue_is_demoted_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(demote, "_own", lambda path, num_kept: [n for n in path.nodes[::-1] if not n.num_holders])


@bug
def what_is_demoted_keeps_its_stamp(patch: pytest.MonkeyPatch) -> None:
    real = demote.demote

    def demote_(tree: RadixTree, *args: Any) -> int:  # noqa: ANN401
        stamps = {node: node.stamp for node in tree}
        num_pages = real(tree, *args)
        for node, stamp in stamps.items():
            node.stamp = max(node.stamp, stamp)
        return num_pages

    patch.setattr(cache, "demote", demote_)


@bug
def a_page_too_much_is_demoted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache, "demote", lambda tree, path, num_kept: demote.demote(tree, path, max(0, num_kept - 1)))


@bug
def nothing_is_demoted_but_the_last_edge(patch: pytest.MonkeyPatch) -> None:
    real = demote._own
    patch.setattr(demote, "_own", lambda path, num_kept: real(path, num_kept)[:1])


# -- copies and pages -------------------------------------------------------------------------------------------------


@bug
def the_tail_is_not_copied(patch: pytest.MonkeyPatch) -> None:
    skipping(patch, starting, "_copy_tails")


@bug
def a_cut_page_is_written_without_a_copy(patch: pytest.MonkeyPatch) -> None:
    skipping(patch, Growth, "copy")


@bug
def a_fork_copies_nothing(patch: pytest.MonkeyPatch) -> None:
    skipping(patch, CacheDescriptor, "copy_tail")


@bug
def the_source_of_a_tail_may_be_evicted_for_it(patch: pytest.MonkeyPatch) -> None:
    real = Plan.pages_to_source
    patch.setattr(Plan, "pages_to_source", lambda self: real(self) - 1)


@bug
def a_cleared_sequence_goes_on_publishing(patch: pytest.MonkeyPatch) -> None:
    real = PrefixCache.clear

    def clear(self: PrefixCache) -> None:
        real(self)
        for run in self.state.running.values():
            run.is_detached = False

    patch.setattr(PrefixCache, "clear", clear)


# -- the test ---------------------------------------------------------------------------------------------------------


def first_failure() -> LifeError | None:
    for seed in range(NUM_LIVES):
        try:
            random_life(seed, NUM_STEPS)
        except LifeError as found:
            return found
    return None


@pytest.mark.parametrize("name", list(PLANTS))
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTS[name](monkeypatch)
    found = first_failure()
    assert found is not None, f"{NUM_LIVES} lives did not notice it"
    # Found out, not crashed into: a plant that does not fit the code any more would raise something else.
    assert isinstance(found.error, (AssertionError, SeqAttnError)), found


def test_nothing_is_caught_where_nothing_is_planted() -> None:
    assert first_failure() is None
