"""Token ids as bytes: comparing them by blocks is comparing them one by one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from radix.tokens import as_key, common_bytes, one_token, token_ids
from seqattn.errors import TokenError
from tests.radix.tables import common_prefix


def test_a_key_is_its_token_ids_and_back() -> None:
    for ids in ([], [0], [2**31 - 1, 1, 256]):
        key = as_key(ids)
        assert len(key) == 4 * len(ids)
        assert token_ids(key).tolist() == ids


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_every_integer_type_gives_the_same_key(dtype: type) -> None:
    assert as_key(np.array([1, 2, 100], dtype=dtype)) == as_key([1, 2, 100])


def test_one_token_is_a_key_of_one() -> None:
    for token in (0, 7, 2**31 - 1, np.int64(5)):
        assert one_token(token) == as_key([int(token)])


@pytest.mark.parametrize(
    "tokens",
    [
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.int32, device="meta"),
        torch.ones(2, dtype=torch.int32).to_sparse(),
        torch.ones(2).to_mkldnn(),
        torch.ones(2, dtype=torch.complex64).conj(),
    ],
    ids=["bfloat16", "float8", "meta", "sparse", "mkldnn", "conjugate"],
)
def test_a_tensor_without_readable_integers_is_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(TokenError, match="token id"):
        as_key(tokens)


def test_a_lazily_negated_tensor_is_read_like_any_other() -> None:
    assert as_key(torch._neg_view(torch.tensor([-3, -4]))) == as_key([3, 4])


@pytest.mark.parametrize("tokens", [[1, True], (0, False), [5, 1, 0, np.True_], [True], [*range(99), True]])
def test_a_bool_among_integers_is_refused_at_its_position(tokens: list[int]) -> None:
    with pytest.raises(TokenError, match=rf"(True|False) at position {len(tokens) - 1} is not an integer"):
        as_key(tokens)


def test_zeros_and_ones_in_a_list_are_tokens() -> None:
    assert token_ids(as_key([0, 1, np.int8(1), 2])).tolist() == [0, 1, 1, 2]
    assert token_ids(as_key([0, 1, 2] * 99)).tolist() == [0, 1, 2] * 99


@pytest.mark.parametrize("value", [5, np.array(5), torch.tensor(5), np.int64(5)], ids=repr)
def test_a_single_value_is_no_list_of_tokens(value: Any) -> None:  # noqa: ANN401  anything may be passed
    with pytest.raises(TokenError, match="must be a flat list, not the single value 5"):
        as_key(value)


@pytest.mark.parametrize("value", [np.array(5), torch.tensor(5), np.array([5]), 5.0, "5", None], ids=repr)
def test_one_token_is_an_integer_and_nothing_like_one(value: Any) -> None:  # noqa: ANN401  as above
    with pytest.raises(TokenError, match=r"a token id must be an integer in \[0, 2\*\*31\), not "):
        one_token(value)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 127, 128, 129, 1000, 16384, 16385, 40000])
def test_what_two_keys_have_in_common_is_found_to_the_token(num_tokens: int) -> None:
    rng = random.Random(num_tokens)
    ids = tuple(rng.choices(range(2**31), k=num_tokens))
    for at in {0, num_tokens // 2, num_tokens - 1} & set(range(num_tokens)):
        for other_id in (ids[at] ^ 1, ids[at] ^ (1 << 30)):
            other = (*ids[:at], other_id, *ids[at + 1 :])
            assert common_bytes(as_key(ids), as_key(other)) == 4 * at
    assert common_bytes(as_key(ids), as_key(ids)) == 4 * num_tokens


def test_keys_are_compared_from_an_offset_on_and_to_the_shorter_end() -> None:
    rng = random.Random(3)
    for _ in range(300):
        ids = tuple(rng.choices(range(2), k=rng.randint(0, 400)))
        offset = rng.randint(0, len(ids))
        key = tuple(rng.choices(range(2), k=rng.randint(0, 5))) if rng.random() < 0.5 else (*ids[offset:][:300], 0)
        assert common_bytes(as_key(key), as_key(ids), 4 * offset) == 4 * common_prefix(key, ids[offset:])
