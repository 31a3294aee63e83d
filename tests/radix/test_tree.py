"""`RadixTree` alone: worked examples of splits, matches, insertion and trimming, and what its `check` finds."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from radix.node import Node
from radix.tokens import as_key
from radix.tree import Inserted, RadixTree, pages_of
from seqattn.errors import InvariantError, TokenError
from tests.radix.lives import Tokens
from tests.radix.state import entries, eviction_order
from tests.radix.tables import common_prefix


def page_bytes(*pages: int) -> bytes:
    return np.array(pages, dtype=np.int32).tobytes()


def insert(tree: RadixTree, tokens: list[int], *pages: int) -> Inserted:
    done = tree.insert(as_key(tokens), page_bytes(*pages))
    tree.check()
    return done


def tree_of(page_size: int, *items: tuple[list[int], list[int]]) -> RadixTree:
    tree = RadixTree(page_size)
    for tokens, pages in items:
        insert(tree, tokens, *pages)
    return tree


def edges(tree: RadixTree) -> dict[Tokens, tuple[int, ...]]:
    """The pages of each edge, by its tokens."""
    return {tuple(np.frombuffer(n.key, dtype=np.int32).tolist()): tuple(n.page_ids.tolist()) for n in tree}


def matched(tree: RadixTree, tokens: list[int], limit: int | None = None) -> tuple[int, list[int]]:
    """Tokens that match, and all pages of the nodes that the match touches."""
    path = tree.match(as_key(tokens), limit=None if limit is None else 4 * limit)
    return path.num_bytes // 4, np.frombuffer(path.pages, dtype=np.int32).tolist()


def victims(tree: RadixTree, num_pages: int) -> list[int]:
    """Trims so many pages; returns them."""
    victims = tree.victims(num_pages)
    gone = np.frombuffer(pages_of(victims), dtype=np.int32).tolist()
    for node, count in victims:
        tree.trim(node, count)
    tree.check()
    return sorted(gone)


# -- match ------------------------------------------------------------------------------------------------------------


def test_the_example_at_the_top_of_the_module_is_true() -> None:
    # root ──[a … h]──▶ A ──[i j k l m]──▶ B        query: a … j x
    #                    └──[p q r s]────▶ C
    head = list(range(8))
    tree = tree_of(4, ([*head, 8, 9, 10, 11, 12], [0, 1, 2, 3]), ([*head, 20, 21, 22, 23], [0, 1, 4]))
    assert edges(tree) == {tuple(head): (0, 1), (8, 9, 10, 11, 12): (2, 3), (20, 21, 22, 23): (4,)}
    path = tree.match(as_key([*head, 8, 9, 99]))
    assert [node.num_tokens for node in path.nodes] == [8, 5]
    assert path.num_bytes // 4 == 10


@pytest.mark.parametrize(
    ("query", "limit", "expected"),
    [
        ([], None, (0, [])),
        ([9], None, (0, [])),
        ([1, 2, 3, 4], None, (4, [0, 1])),
        ([1, 2, 3, 4], 3, (3, [0, 1])),
        ([1, 2, 3, 4], 2, (2, [0, 1])),
        ([1, 2, 3, 4], 0, (0, [])),
        ([1, 2, 3, 4, 5, 6], 4, (4, [0, 1])),
        ([1, 2, 3, 4, 5, 6], 5, (5, [0, 1, 2])),
        ([1, 2, 3, 9], None, (3, [0, 1])),
    ],
)
def test_a_match_stops_at_the_first_difference_or_at_the_limit(
    query: list[int], limit: int | None, expected: tuple[int, list[int]]
) -> None:
    tree = tree_of(2, ([1, 2, 3, 4, 5, 6], [0, 1, 2]), ([1, 2, 3, 4, 7, 8], [0, 1, 3]))
    assert matched(tree, query, limit) == expected


def test_the_longest_match_inside_a_page_is_found_among_many_siblings() -> None:
    rng = random.Random(5)
    pages = {tuple(rng.choices(range(3), k=4)) for _ in range(60)}
    tree = tree_of(4, *((list(tokens), [page]) for page, tokens in enumerate(sorted(pages))))
    for _ in range(300):
        query = tuple(rng.choices(range(3), k=4))
        assert matched(tree, list(query))[0] == max(common_prefix(query, tokens) for tokens in pages)


# -- insert -----------------------------------------------------------------------------------------------------------


def test_an_edge_is_split_where_another_key_leaves_it() -> None:
    tree = tree_of(2, ([1, 2, 3, 4, 5, 6], [0, 1, 2]))
    (old,) = tree
    done = insert(tree, [1, 2, 9], 5, 6)
    assert edges(tree) == {(1, 2): (0,), (3, 4, 5, 6): (1, 2), (9,): (6,)}
    assert (done.num_known, done.pages) == (1, page_bytes(0, 6))
    assert old.num_tokens == 4, "the existing node keeps the lower half"


def test_an_edge_is_split_where_another_key_ends() -> None:
    tree = tree_of(2, ([1, 2, 3, 4], [0, 1]))
    insert(tree, [1, 2], 7)
    assert edges(tree) == {(1, 2): (0,), (3, 4): (1,)}


def test_keys_that_part_inside_their_first_page_are_siblings_and_split_nothing() -> None:
    tree = tree_of(4, ([1, 2, 3, 4], [0]), ([1, 2, 3, 5], [1]), ([1, 2, 9], [2]), ([1, 3], [3]))
    assert edges(tree) == {(1, 2, 3, 4): (0,), (1, 2, 3, 5): (1,), (1, 2, 9): (2,), (1, 3): (3,)}


def test_a_key_that_is_there_adds_nothing() -> None:
    tree = tree_of(2, ([1, 2, 3], [0, 1]))
    for tokens, pages in (([1, 2, 3], [5, 6]), ([1], [7]), ([1, 2], [8])):
        insert(tree, tokens, *pages)
    assert {page for page, _ in entries(tree).values()} == {0, 1}


def test_a_partly_filled_page_gives_way_to_a_fuller_one() -> None:
    tree = tree_of(4, ([1, 2, 3, 4, 5, 6], [0, 1]))
    done = insert(tree, [1, 2, 3, 4, 5, 6, 7, 8, 9], 2, 3, 4)
    assert {tokens[-1]: page for (_, tokens), (page, _) in entries(tree).items()} == {4: 0, 8: 3, 9: 4}
    assert done.replaced is not None
    assert done.replaced[0] == 1


def test_a_fuller_page_is_found_under_its_new_first_page() -> None:
    tree = tree_of(4, ([1, 2], [0]), ([1, 9], [1]), ([1, 5, 6], [2]))
    insert(tree, [1, 2, 3, 4], 3)
    assert edges(tree) == {(1, 2, 3, 4): (3,), (1, 9): (1,), (1, 5, 6): (2,)}
    assert matched(tree, [1, 2, 3, 4, 5]) == (4, [3])


def test_children_lie_in_a_slot_until_there_are_two() -> None:
    tree = tree_of(2, ([1, 2], [0]))
    root = tree.roots[None]
    assert isinstance(root.children, Node)
    insert(tree, [3, 4], 1)
    assert not isinstance(root.children, Node)
    assert victims(tree, 1) == [0]
    assert isinstance(root.children, Node)


def test_an_empty_key_is_refused() -> None:
    tree = RadixTree(2)
    with pytest.raises(TokenError, match="empty"):
        tree.insert(b"", b"")
    assert not tree.roots


# -- trim -------------------------------------------------------------------------------------------------------------


def test_pages_are_trimmed_from_the_tail_of_the_oldest_leaf() -> None:
    tree = tree_of(2, ([1, 2, 3, 4, 5], [0, 1, 2]), ([7, 8], [3]))
    assert [victims(tree, 1) for _ in range(5)] == [[2], [1], [0], [3], []]
    assert not tree.roots


def test_victims_come_back_without_being_taken() -> None:
    tree = tree_of(2, ([1, 2, 3, 4, 5], [0, 1, 2]))
    before = entries(tree)
    assert [count for _, count in tree.victims(2)] == [2]
    assert entries(tree) == before


def test_what_is_held_is_not_trimmed() -> None:
    tree = tree_of(2, ([1, 2, 3, 4], [0, 1]), ([7, 8], [2]))
    path = tree.match(as_key([1, 2]))
    node = tree.cut(path.nodes[-1], path.num_pages, 1)
    tree.hold(node)
    tree.check()
    assert victims(tree, 9) == [1, 2]
    tree.release(node)
    assert victims(tree, 9) == [0]


def test_a_stamp_moves_the_path_to_the_recent_end() -> None:
    tree = tree_of(2, ([1, 2, 3, 4], [0, 1]), ([7, 8], [2]))
    assert eviction_order(tree) == [1, 0, 2]
    tree.stamp(tree.match(as_key([1, 2, 3, 4])).nodes[-1])
    tree.check()
    assert eviction_order(tree) == [2, 1, 0]


# -- against brute force ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
def test_random_insertions_match_brute_force(page_size: int) -> None:
    rng = random.Random(page_size)
    tree, known, next_page = RadixTree(page_size), list[Tokens](), 0
    for _ in range(250):
        base = rng.choice(known) if known else ()
        tokens = base[: rng.randint(0, len(base))] + tuple(rng.choices(range(2), k=rng.randint(1, 2 * page_size)))
        num_pages = -(-len(tokens) // page_size)
        assert matched(tree, list(tokens))[0] == max((common_prefix(tokens, other) for other in known), default=0)
        insert(tree, list(tokens), *range(next_page, next_page + num_pages))
        next_page += num_pages
        known.append(tokens)
        assert matched(tree, list(tokens))[0] == len(tokens)


# -- check ------------------------------------------------------------------------------------------------------------


def spoiled() -> RadixTree:
    return tree_of(2, ([1, 2, 3, 4, 5], [0, 1, 2]), ([1, 2, 7, 8], [0, 3]), ([9, 9], [4]))


def node_of(tree: RadixTree, page: int) -> Node:
    return next(node for node in tree if page in node.page_ids)


def swap_queue(tree: RadixTree) -> None:
    tree.idle.move_to_end(next(iter(tree.idle)))


SPOILS: list[tuple[str, str, Callable[[RadixTree], object]]] = [
    ("T1", "a page too few", lambda t: setattr(node_of(t, 4), "pages", b"")),
    ("T1", "a page too many", lambda t: setattr(node_of(t, 4), "pages", page_bytes(4, 5))),
    ("T2", "another parent", lambda t: setattr(node_of(t, 3), "parent", t.roots[None])),
    ("T2", "filed under another page", lambda t: setattr(node_of(t, 4), "key", as_key([8, 8]))),
    ("T2", "an empty root", lambda t: setattr(t.roots[None], "children", None)),
    ("T3", "a page twice", lambda t: setattr(node_of(t, 4), "pages", page_bytes(0))),
    ("T4", "used after its parent", lambda t: setattr(node_of(t, 3), "stamp", 99)),
    ("T6", "a page not counted", lambda t: setattr(t, "num_pages", 4)),
    ("T6", "an idle page not counted", lambda t: setattr(t, "num_idle_pages", 4)),
    ("T6", "missing from the queue", lambda t: t.idle.popitem()),
    ("T6", "out of order in the queue", swap_queue),
    ("T6", "held and in the queue", lambda t: setattr(node_of(t, 0), "num_holders", 1)),
    ("C2", "more holders than its parent", lambda t: setattr(node_of(t, 3), "num_holders", 1)),
]


@pytest.mark.parametrize(("name", "spoil"), [(s[0], s[2]) for s in SPOILS], ids=[f"{s[0]} {s[1]}" for s in SPOILS])
def test_check_names_the_invariant_that_does_not_hold(name: str, spoil: Callable[[RadixTree], object]) -> None:
    tree = spoiled()
    tree.check()
    spoil(tree)
    with pytest.raises(InvariantError) as error:
        tree.check()
    assert error.value.name == name


def test_check_finds_a_sibling_that_is_a_prefix_of_another() -> None:
    tree = tree_of(4, ([1, 2, 3], [0]), ([1, 9], [1]))
    root = tree.roots[None]
    shorter = Node(as_key([1, 2]), page_bytes(2), root, stamp=tree.clock)
    root.add(shorter, tree.page_bytes)
    tree.idle[shorter] = None
    tree.num_pages = tree.num_idle_pages = 3
    with pytest.raises(InvariantError) as error:
        tree.check()
    assert error.value.name == "T5"


def test_check_finds_a_partly_filled_page_above_a_leaf() -> None:
    tree = tree_of(2, ([1, 2, 3, 4], [0, 1]), ([1, 2, 5, 6], [0, 2]))
    node_of(tree, 0).key = as_key([1])
    with pytest.raises(InvariantError) as error:
        tree.check()
    assert error.value.name == "T1"
