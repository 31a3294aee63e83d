"""`Children` against the obvious: a plain dictionary, searched through."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from radix.children import Children
from radix.node import Node
from radix.tokens import as_key, common_bytes

PAGES = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(as_key)


@given(st.lists(st.tuples(st.sampled_from(["file", "take out", "nearest", "neighbours"]), PAGES), max_size=60))
def test_children_are_found_like_in_a_plain_dictionary(calls: list[tuple[str, bytes]]) -> None:
    kids, truth = Children(), dict[bytes, Node]()
    for name, page in calls:
        if name == "file" and page not in truth:
            truth[page] = Node(page, b"", None)
            kids.file(page, truth[page])
        elif name == "take out" and page in truth:
            del truth[page]
            kids.take_out(page)
        elif page not in truth:
            check_lookups(kids, truth, page)
        assert dict(kids) == truth


def check_lookups(kids: Children, truth: dict[bytes, Node], page: bytes) -> None:
    most = max((common_bytes(page, key) for key in truth), default=0)
    child, common = kids.nearest(page)
    assert common == most
    assert (child is None) == (most == 0)
    assert child is None or common_bytes(page, child.key) == most
    before, after = kids.neighbours(page)
    if most:
        assert before is truth.get(max((key for key in truth if key < page), default=b""))
        assert after is truth.get(min((key for key in truth if key > page), default=b""))


def test_a_page_without_a_first_token_in_common_is_answered_without_an_order() -> None:
    kids = Children()
    for token in range(100):
        kids.file(as_key([token, 1]), Node(as_key([token, 1]), b"", None))
    assert kids.nearest(as_key([200, 1])) == (None, 0)
    assert kids._order is None
    assert kids.nearest(as_key([7, 2])) == (kids[as_key([7, 1])], 4)
    assert kids._order is not None
