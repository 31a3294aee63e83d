"""`PrefixCache.check` names what is wrong; each state is spoiled by hand, in one place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from radix.cache import PrefixCache
from radix.children import Children
from radix.node import Node
from seqattn.descriptor import SequenceData
from seqattn.errors import InvariantError
from tests.radix.world import live

#: Tree: [1 1]0 ── [2 2 3]1 2, idle but for [1 1]; [9]6, pinned. Sequence 1: [1 1 7] on 0 3, sequence 2: [8 8 8] on 4 5.
LIFE = "start 0 [1,1,2,2,3] · finish 0 · start 1 [1,1,7] · start 2 [8,8,8] · start 0 [9] · finish 0 · pin 0 [9]"


def node_of(cache: PrefixCache, page: int) -> Node:
    return next(node for node in cache.tree if page in node.page_ids)


def drop(cache: PrefixCache, *pages: int) -> None:
    cache.manager.drop(np.array(pages, dtype=np.int32))


def hold(cache: PrefixCache, *pages: int) -> None:
    cache.manager.hold(np.array(pages, dtype=np.int32))


def swap_pages(cache: PrefixCache) -> None:
    """Sequence 1 names another page than the tree for the tokens that they share; the counts follow."""
    cache.state.running[1].table[0] = 4
    hold(cache, 4)
    drop(cache, 0)


def forget_pages(cache: PrefixCache) -> None:
    """The pages of [2 2 3] leave the tree, but keep its references."""
    tree = cache.tree
    for node, count in tree.victims(2):
        tree.trim(node, count)


def add_behind(cache: PrefixCache) -> None:
    """A sequence that the cache did not start."""
    cache.descriptor.seq_id_to_data["x"] = SequenceData(cache.manager.take(1), 1)


def make_idle(cache: PrefixCache) -> None:
    """[1 1] is filed as idle, though a sequence holds it."""
    node = node_of(cache, 0)
    node.num_holders = 0
    cache.tree.idle[node] = None
    cache.tree.idle.move_to_end(node)
    cache.tree.num_idle_pages += 1
    node.stamp = cache.tree.clock + 1


def leave_tree(cache: PrefixCache) -> None:
    """Sequence 1 holds a node that looks like [1 1]; that one is idle."""
    make_idle(cache)
    real = node_of(cache, 0)
    cache.state.running[1].node = Node(real.key, real.pages, real.parent)


def reach_into_idle(cache: PrefixCache) -> None:
    """Sequence 2 has an idle page of the tree among its own; the counts follow."""
    cache.state.running[2].table[0] = 1
    hold(cache, 1)
    drop(cache, 4)


def put_in_container(cache: PrefixCache) -> None:
    """The only child of [1 1] is filed as if there were several."""
    child = node_of(cache, 1)
    node_of(cache, 0).children = kids = Children()
    kids.file(child.key[: cache.tree.page_bytes], child)


def put_before_child(cache: PrefixCache) -> None:
    """[1 1] is idle and next in the queue, before its child of the same stamp."""
    cache.abort(1)
    child = node_of(cache, 1)
    child.stamp = node_of(cache, 0).stamp
    cache.tree.idle.move_to_end(child)


def hold_more(cache: PrefixCache) -> None:
    """A node claims a holder that there is not."""
    node_of(cache, 0).num_holders += 1


def lose_pin(cache: PrefixCache) -> None:
    cache.state.pins.clear()


def other_tokens(cache: PrefixCache) -> None:
    run = cache.state.running[1]
    run.prompt = b"\7" * len(run.prompt)


#: what is spoiled, how the message begins, and how it is done
SPOILS: dict[str, tuple[str, Callable[[PrefixCache], object]]] = {
    "a reference too few": ("P3", lambda c: drop(c, 0)),
    "a reference too many": ("P3", lambda c: hold(c, 0)),
    "a page of the tree is free": ("P3", lambda c: drop(c, 1)),
    "a count that does not fit the free list": ("P2", lambda c: c.manager.ref_count.__setitem__(0, 0)),
    "pages that nobody holds": ("P3", forget_pages),
    "pages that left a table": ("P3", lambda c: c.state.running[2].cut(1)),
    "a page twice in a table": ("S1", lambda c: c.state.running[2].table.__setitem__(1, c.state.running[2].table[0])),
    "a last page that is too full": ("S2", lambda c: setattr(c.state.running[2], "last_page_len", 3)),
    "a sequence of nobody": ("S1", add_behind),
    "a token id too few": ("S1", lambda c: setattr(c.state.running[2], "prompt", b"\1\0\0\0")),
    "other tokens than the path's": ("C2", other_tokens),
    "another page than the path's": ("C2", swap_pages),
    "a path that is one page too short": ("C2", lambda c: setattr(c.state.running[1], "node", None)),
    "a holder too many": ("C2", hold_more),
    "a pin that is not known": ("P3", lose_pin),
    "a pin on another node": ("C2", lambda c: setattr(next(iter(c.state.pins)), "node", node_of(c, 0))),
    "a node that is held and idle": ("C2", make_idle),
    "a node outside the tree that is held": ("C2: a node that is held is not in the tree", leave_tree),
    "an idle page in a table": ("C1: pages [1] of an idle node have other holders", reach_into_idle),
    "an only child in a container": ("T2: an only child lies in a container", put_in_container),
    "a parent before its child": ("T6: a node stands before its child in the queue", put_before_child),
    "a node in the queue of no tree": ("T6", lambda c: c.tree.idle.update({Node(b"", b"", None): None})),
}


@pytest.mark.parametrize("name", list(SPOILS))
def test_check_names_the_invariant_that_does_not_hold(name: str) -> None:
    cache = live(2, 9, LIFE).cache
    cache.check()
    message, spoil = SPOILS[name]
    spoil(cache)
    with pytest.raises(InvariantError) as error:
        cache.check()
    invariant, _, problem = message.partition(": ")
    assert error.value.name == invariant
    assert str(error.value).startswith(f"{invariant}: {problem}")


def test_check_knows_pages_held_by_hand_only_if_it_is_told() -> None:
    cache = live(2, 9, LIFE).cache
    pages = cache.manager.allocate(1)
    cache.check(outside=pages)
    with pytest.raises(InvariantError, match="P3"):
        cache.check(outside=[*pages, *pages])
    with pytest.raises(InvariantError, match="P3"):
        cache.check(outside=[0])


def test_check_changes_nothing() -> None:
    world = live(2, 9, LIFE)
    before = [(id(node), node.stamp, node.key) for node in world.cache.tree]
    world.cache.check()
    assert [(id(node), node.stamp, node.key) for node in world.cache.tree] == before


def test_a_namespace_that_does_not_equal_itself_is_sound() -> None:
    cache, nan = live(2, 9, "start 0 [1,1,2] · finish 0").cache, float("nan")
    cache.start(1, [1, 1, 3], namespace=nan)
    cache.finish(1)
    cache.check()
    assert cache.match([1, 1, 2], namespace=nan).num_tokens == 2
    with cache.pin([1, 1], namespace=nan):
        assert cache.evict(9) == 3
        cache.check()
    assert cache.evict(9) == 1
    assert not cache.tree.roots
