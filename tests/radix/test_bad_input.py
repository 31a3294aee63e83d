"""What `PrefixCache` refuses: each error is of the project's own tree, shows the value, and changes nothing."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from radix.cache import PrefixCache
from seqattn.errors import (
    BadValueError,
    DuplicateSequenceError,
    InvariantError,
    LengthError,
    NoPageError,
    PromptTooLargeError,
    SeqAttnError,
    TokenError,
    UnknownSequenceError,
)
from seqattn.pages import PageAllocator
from tests.radix.state import snapshot
from tests.radix.world import World

Call = Callable[[PrefixCache], Any]


def running() -> PrefixCache:
    """Tree: [1 2 3 4] and, in another namespace, [5]; sequence 0: [1 2 3 4 6], sequence 1: [7]."""
    life = "start 9 [1,2,3,4] · finish 9 · start 9 [5] in b · finish 9 · start 0 [1,2,3,4,6] · start 1 [7]"
    return World(8, 2).live(life).cache


def refuses(call: Call, kind: type[Exception], message: str) -> None:
    cache = running()
    before = snapshot(cache)
    with pytest.raises(kind, match=message) as error:
        call(cache)
    assert isinstance(error.value, SeqAttnError)
    assert snapshot(cache) == before
    cache.check()


BAD_TOKENS: dict[str, tuple[Any, str]] = {
    "negative": ([3, -1], "-1 at position 1"),
    "negative, int64": (np.array([3, 4, -7], dtype=np.int64), "-7 at position 2"),
    "negative, int32": (np.array([-7], dtype=np.int32), "-7 at position 0"),
    "too large": ([2**31], "2147483648 at position 0"),
    "too large for any integer": ([2**70], "2\\*\\*31|1180591620717411303424"),
    "too large, uint32": (np.array([1, 2**32 - 1], dtype=np.uint32), "4294967295 at position 1"),
    "floats": ([1.0, 2.5], "1.0 at position 0"),
    "a float tensor": (torch.tensor([1.5]), "1.5 at position 0"),
    "bools": ([True, False], "True at position 0"),
    "text": ("hello", "encode"),
    "bytes": (b"hello", "encode"),
    "nested": ([[1, 2], [3, 4]], "flat"),
    "ragged": ([[1], [2, 3]], "flat"),
    "None": (None, "None|flat|integer"),
    "words": (["a"], "'a'|integer"),
}

TAKES_TOKENS: dict[str, Callable[[PrefixCache, Any], Any]] = {
    "start": lambda c, tokens: c.start(5, tokens),
    "start_many": lambda c, tokens: c.start_many([4, 5], [[1, 2, 3], tokens]),
    "extend": lambda c, tokens: c.extend([0, 1], [[1], tokens]),
    "match": lambda c, tokens: c.match(tokens),
    "can_start": lambda c, tokens: c.can_start(tokens),
    "pin": lambda c, tokens: c.pin(tokens).__enter__(),
}


@pytest.mark.parametrize(
    "tokens", [t for name, t in BAD_TOKENS.items() if name != "a number"], ids=lambda t: str(t[0])[:20]
)
@pytest.mark.parametrize("method", list(TAKES_TOKENS))
def test_what_is_no_token_is_refused_with_its_value_and_position(method: str, tokens: tuple[Any, str]) -> None:
    refuses(lambda c: TAKES_TOKENS[method](c, tokens[0]), TokenError, tokens[1])


@pytest.mark.parametrize("method", [name for name in TAKES_TOKENS if name != "extend"])
def test_a_single_number_is_no_prompt(method: str) -> None:
    refuses(lambda c: TAKES_TOKENS[method](c, 5), TokenError, "flat")


@pytest.mark.parametrize("token", [-1, 2**31, np.int64(-3), True])
def test_a_single_token_is_checked_like_many(token: int) -> None:
    refuses(lambda c: c.extend([0], [token]), TokenError, str(token))


@pytest.mark.parametrize(
    "tokens", [(1, 2), array("i", [1, 2]), np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), 2]]
)
def test_tokens_may_be_anything_that_holds_integers(tokens: Any) -> None:  # noqa: ANN401  that is the point
    cache = running()
    assert cache.match(tokens).num_tokens == 2
    assert cache.start(5, tokens).num_cached_tokens == 1


def test_the_largest_token_id_is_one() -> None:
    cache = running()
    cache.start(5, [2**31 - 1, 0])
    cache.finish(5)
    assert cache.match([2**31 - 1, 0]).num_tokens == 2


# Of no type that the methods take.
HALF: Any = 0.5
NO_HASH: Any = [1]

REFUSED: dict[str, tuple[Call, type[Exception], str]] = {
    "an empty prompt": (lambda c: c.start(5, []), TokenError, "empty"),
    "an empty prompt among others": (lambda c: c.start_many([5, 6], [[1], []]), TokenError, "empty"),
    "can_start of an empty prompt": (lambda c: c.can_start([]), TokenError, "empty"),
    "extending by nothing": (lambda c: c.extend([0, 1], [[1], []]), BadValueError, "0|empty"),
    "starting a running id": (lambda c: c.start(0, [1]), DuplicateSequenceError, "0"),
    "starting a running id among others": (lambda c: c.start_many([5, 1], [[1], [1]]), DuplicateSequenceError, "1"),
    "starting an id twice": (lambda c: c.start_many([5, 5], [[1], [1]]), DuplicateSequenceError, "5"),
    "too few prompts": (lambda c: c.start_many([5, 6], [[1]]), LengthError, "2 .* 1"),
    "too few namespaces": (lambda c: c.start_many([5, 6], [[1], [2]], namespaces=["b"]), LengthError, "1"),
    "uncached below zero": (lambda c: c.start(5, [1], min_uncached_tokens=-1), LengthError, "-1"),
    "uncached no integer": (lambda c: c.start(5, [1], min_uncached_tokens=HALF), LengthError, "0.5"),
    "a prompt larger than the cache": (lambda c: c.start(5, [1] * 17), PromptTooLargeError, "9 pages"),
    "such a prompt among others": (lambda c: c.start_many([5, 6], [[1], [1] * 17]), PromptTooLargeError, "9 pages"),
    "more prompts than fit": (lambda c: c.start_many([5, 6], [[8] * 6, [9] * 6]), NoPageError, "6 pages needed, 4"),
    "extending an unknown id": (lambda c: c.extend([0, 9], [[1], [1]]), UnknownSequenceError, "9"),
    "extending an id twice": (lambda c: c.extend([0, 0], [[1], [1]]), DuplicateSequenceError, "0"),
    "too few tokens to extend by": (lambda c: c.extend([0, 1], [[1]]), LengthError, "2 .* 1"),
    "extending past the last page": (lambda c: c.extend([0, 1], [[1], [1] * 20]), NoPageError, "pages needed"),
    "amending an unknown id": (lambda c: c.amend([9], [1]), UnknownSequenceError, "9"),
    "amending a token of the prompt": (lambda c: c.amend([1], [8]), LengthError, "1 is part of the prompt"),
    "amending one of two": (lambda c: c.amend([0, 1], [8]), LengthError, "each of 2 sequences, not 1"),
    "amending by two tokens": (lambda c: c.amend([0], [[8, 9]]), LengthError, "one token id for each"),
    "amending by what is no token": (lambda c: c.amend([0], [-8]), TokenError, "-8"),
    "publishing an unknown id": (lambda c: c.publish(9), UnknownSequenceError, "9"),
    "publishing more than there is": (lambda c: c.publish(0, num_tokens=6), LengthError, "5 tokens .* 6"),
    "publishing less than nothing": (lambda c: c.publish(0, num_tokens=-1), LengthError, "-1"),
    "finishing an unknown id": (lambda c: c.finish(9), UnknownSequenceError, "9"),
    "finishing more than there is": (lambda c: c.finish(0, num_tokens=6), LengthError, "5 tokens .* 6"),
    "finishing half a token": (lambda c: c.finish(0, num_tokens=HALF), LengthError, "0.5"),
    "aborting an unknown id": (lambda c: c.abort(9), UnknownSequenceError, "9"),
    "forking an unknown id": (lambda c: c.fork(9, 5), UnknownSequenceError, "9"),
    "forking onto a running id": (lambda c: c.fork(0, 1), DuplicateSequenceError, "1"),
    "forking onto itself": (lambda c: c.fork(0, 0), DuplicateSequenceError, "0"),
    "cutting an unknown id": (lambda c: c.truncate(9, 0), UnknownSequenceError, "9"),
    "cutting to more than there is": (lambda c: c.truncate(0, 6), LengthError, "5 tokens .* 6"),
    "cutting below zero": (lambda c: c.truncate(0, -1), LengthError, "-1"),
    "evicting less than nothing": (lambda c: c.evict(-1), LengthError, "-1"),
    "evicting half a page": (lambda c: c.evict(HALF), LengthError, "0.5"),
    "packing an unknown id": (lambda c: c.pack_for_flashinfer([0, 9]), UnknownSequenceError, "9"),
    "packing hybrid an unknown id": (lambda c: c.pack_hybrid_for_flashinfer([0, 9]), UnknownSequenceError, "9"),
    "an id that cannot be hashed": (lambda c: c.start(NO_HASH, [1]), SeqAttnError, r"\[1\]"),
    "ids that cannot be hashed": (lambda c: c.start_many([NO_HASH], [[1]]), SeqAttnError, r"\[1\]"),
    "an unknown id that cannot be hashed": (lambda c: c.finish(NO_HASH), SeqAttnError, r"\[1\]"),
    "forking onto what cannot be hashed": (lambda c: c.fork(0, NO_HASH), SeqAttnError, r"\[1\]"),
    "a namespace that cannot be hashed": (lambda c: c.start(5, [1], namespace=NO_HASH), SeqAttnError, r"\[1\]"),
    "matching in such a namespace": (lambda c: c.match([1], namespace=NO_HASH), SeqAttnError, r"\[1\]"),
    "pinning in such a namespace": (lambda c: c.pin([1], namespace=NO_HASH).__enter__(), SeqAttnError, r"\[1\]"),
    "asking for such a namespace": (lambda c: c.can_start([1], namespace=NO_HASH), SeqAttnError, r"\[1\]"),
    "pages out of range to check": (lambda c: c.check(outside=[8]), BadValueError, "8"),
    "pages to check that nobody holds": (lambda c: c.check(outside=[7]), InvariantError, "P3"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused_shows_the_value_and_changes_nothing(name: str) -> None:
    refuses(*REFUSED[name])


@pytest.mark.parametrize("policy", ["lfu", "", None])
def test_an_unknown_policy_is_refused(policy: Any) -> None:  # noqa: ANN401  anything but "lru"
    with pytest.raises(BadValueError, match="lru"):
        PrefixCache(PageAllocator(1, 1), policy=policy)


def test_starting_and_extending_nothing_is_legal() -> None:
    cache = running()
    before = snapshot(cache)
    assert cache.start_many([], []) == []
    cache.extend([], [])
    assert cache.evict(0) == 0
    assert cache.pack_for_flashinfer([]).kv_page_indptr.tolist() == [0]
    assert snapshot(cache) == before


def test_a_token_that_is_published_is_not_amended_nor_is_any_other_then() -> None:
    cache = running()
    cache.extend([0, 1], [[8], [9, 9]])
    cache.amend([0, 1], [5, 6])
    assert cache.state.running[1].key(3) == np.array([7, 9, 6], dtype=np.int32).tobytes()
    cache.extend([1], [4])
    cache.publish(1)
    before = snapshot(cache)
    with pytest.raises(LengthError, match="1 is published"):
        cache.amend([0, 1], [2, 3])
    assert snapshot(cache) == before
    cache.truncate(1, 1)
    with pytest.raises(LengthError, match="1 is part of the prompt"):
        cache.amend([1], [3])
    cache.extend([1], [3])
    cache.amend([1], torch.tensor([2]))
    cache.finish(1)
    assert cache.match([7, 2]).num_tokens == 2
    cache.check()


def test_can_start_says_no_to_a_prompt_that_never_fits() -> None:
    cache = running()
    assert not cache.can_start([1] * 17)
    assert cache.can_start([9] * 8)
    assert not cache.can_start([9] * 9)
