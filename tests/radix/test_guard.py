"""Prompts that do not continue what a conversation holds: where they leave it, why, and who is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from radix import Break, ChatSession, PrefixCache, RetokenisationWarning, Sessions
from radix.guard import compare
from radix.tokens import as_key
from seqattn import PageAllocator
from tests.radix.conversation import Clock, serve


def words(ids: Sequence[int]) -> str:
    """One token a word, as a tokenizer decodes them."""
    return " ".join(WORDS[token] for token in ids)


WORDS = (
    "system date1 date2 user hello <think> hmm well </think> Paris . again twice now more text here".split()  # noqa: SIM905
)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


CASES = [
    # what is held, what is given, where they part, and the cause
    ("system user hello Paris .", "system user hello Paris . user again", None, None),
    ("system user hello Paris .", "system user hello Paris .", None, None),
    ("system user hello Paris .", "system user hello", 3, "cut short"),
    ("system date1 user hello Paris .", "system date2 user hello Paris . user again", 1, "beginning changed"),
    ("system user hello Paris . user twice", "system user hello Paris . user again", 6, "changed"),
    (
        "system user hello <think> hmm well </think> Paris . more text here now",
        "system user hello Paris . more text here now user again",
        3,
        "thinking taken out",
    ),
    (
        "system user hello twice Paris . more text here now again",
        "system user hello Paris . more text here now again user again",
        3,
        "text taken out",
    ),
    (
        "system user hello Paris . more text here now again",
        "system user hello well Paris . more text here now again user again",
        3,
        "text put in",
    ),
    ("system user hello Paris .", "system user hello well Paris . user more text", 3, "text put in"),
]


@pytest.mark.parametrize(("held", "given", "position", "cause"), CASES)
def test_a_break_is_found_where_it_is_and_its_cause_named(
    held: str, given: str, position: int | None, cause: str | None
) -> None:
    found = compare(as_key(ids(held)), as_key(ids(given)), num_first=3, decode=words)
    if position is None:
        assert found is None
        return
    assert found is not None
    assert (found.position, found.num_lost_tokens, found.cause) == (position, len(ids(held)) - position, cause)
    assert found.texts is not None
    assert f"{found.texts[0]} {found.texts[1]}".startswith(" ".join(held.split()[max(0, position - 8) : position]))
    blind = compare(as_key(ids(held)), as_key(ids(given)), num_first=3, decode=None)
    assert blind is not None
    assert (blind.position, blind.texts) == (position, None)
    assert blind.cause in ("cut short", "beginning changed", "changed")


def test_the_same_text_in_other_tokens_is_recognised() -> None:
    found = compare(as_key([1, 2, 3]), as_key([1, 23, 4]), num_first=1, decode=lambda ids: "".join(map(str, ids)))
    assert found is not None
    assert (found.position, found.cause) == (1, "retokenised")


def test_a_warning_says_where_and_why() -> None:
    heard: list[tuple[ChatSession, Break]] = []
    sessions = Sessions(
        PrefixCache(PageAllocator(32, 4)), clock=Clock(), decode=words, on_break=lambda *args: heard.append(args)
    )
    session = sessions.open("ann")
    session.append(ids("system user hello"))
    session.append(ids("<think> hmm well </think> Paris . more text here"))
    with pytest.warns(RetokenisationWarning) as warned:
        found = session.update(ids("system user hello Paris . more text here user again"))
    assert str(warned[0].message) == (
        "session 'ann': the prompt leaves what is held at token 3, after 'system user hello': held '<think> hmm well "
        "</think> Paris . more text', given 'Paris . more text here user again'. 9 tokens cannot be reused; a thinking "
        "block was taken out of an earlier answer: keep it in the messages"
    )
    assert warned[0].filename == __file__, "it points at the caller"
    assert heard == [(session, found)]
    assert session.last_break is found
    assert session.tokens.tolist() == ids("system user hello Paris . more text here user again")
    assert session.update(session.tokens) is None
    assert session.last_break is found


def test_what_a_prompt_left_behind_is_evicted_first() -> None:
    cache = PrefixCache(PageAllocator(32, 4))
    session = Sessions(cache, clock=Clock()).open("ann")
    session.append(range(8))
    serve(cache, session, [20] * 9)
    with pytest.warns(RetokenisationWarning, match="at token 8, after"):
        session.update([*range(8), 30])
    assert (session.num_pinned_tokens, cache.num_reclaimable_pages) == (8, 2)
    assert session.lengths == [8, 9]
