"""Token ids as bytes.

A key is the bytes of int32 token ids in native order: equality is one memcmp, a slice is one memcpy, and a page's worth
of bytes is a dictionary key. `TOKEN_BYTES * i` is where token i begins.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from seqattn.errors import TokenError

__all__ = [
    "TOKEN_BYTES",
    "Tokens",
    "as_key",
    "check_rest",
    "common_bytes",
    "keys_of",
    "one_token",
    "token_ids",
    "unchecked_key",
    "unchecked_view",
]

#: Whatever numpy can turn into a flat integer array: a list, an array, a numpy array, a torch tensor.
Tokens: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]] | Any"

TOKEN_BYTES = 4
_LIMIT = 2**31
_INT32 = np.dtype(np.int32)
_HIGH_BYTE = TOKEN_BYTES - 1 if sys.byteorder == "little" else 0
_SIGN = 0x80
_STRIDED = 2048 * TOKEN_BYTES
_VIEWED = 4096
_FEW = 64
_BOOLS = {bool, np.bool_}


def as_key(tokens: Tokens) -> bytes:
    """Token ids as a key.

    Args:
        tokens: integers in [0, 2**31), flat: a list, array, numpy array or torch tensor (on any device).

    Raises:
        TokenError: something else, with the first offending value and its position.

    Cost: one pass for the check and one copy for int32; lists cost about 40 ns a token to convert.
    """
    ids: npt.NDArray[Any] = tokens if type(tokens) is np.ndarray else _as_array(tokens)
    if ids.dtype is _INT32 and ids.ndim == 1:
        key = ids.tobytes()
        # A negative id has the high bit of its high byte set; for short keys, looking there beats any numpy call.
        short = len(key) <= _STRIDED
        if not key[_HIGH_BYTE::TOKEN_BYTES].isascii() if short else np.minimum.reduce(ids) < 0:
            raise _bad_token(ids)
        return key
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise _bad_token(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= _LIMIT):
        raise _bad_token(ids)
    return ids.astype(np.int32).tobytes()


def keys_of(token_ids: Sequence[int | Tokens] | Tokens) -> list[bytes]:
    """A key for each entry, which is one id or many; of a flat array or tensor, each id is an entry."""
    if type(token_ids) is list and len(token_ids) == 1 and type(token_ids[0]) is np.ndarray and token_ids[0].ndim:
        return [as_key(token_ids[0])]
    entries: Any = token_ids
    if getattr(entries, "ndim", None) == 1:
        entries = entries.tolist()
    return [one_token(ids) if isinstance(ids, int) else _entry_key(ids) for ids in entries]


def _entry_key(ids: Any) -> bytes:  # noqa: ANN401 (whatever numpy can turn into token ids)
    return one_token(ids.item()) if getattr(ids, "ndim", None) == 0 else as_key(ids)


def unchecked_key(tokens: Tokens) -> bytes:
    """`as_key`, but the ids of an int32 array are not yet checked to be in range.

    What matches cached tokens is a token; `check_rest` checks what does not.
    """
    if type(tokens) is np.ndarray and tokens.dtype is _INT32 and tokens.ndim == 1:
        return tokens.tobytes()
    return as_key(tokens)


def unchecked_view(tokens: Tokens) -> bytes | memoryview:
    """`unchecked_key` that only looks at long int32 arrays: for lookups, which need no copy."""
    if type(tokens) is np.ndarray and tokens.dtype is _INT32 and tokens.ndim == 1:
        if len(tokens) < _VIEWED or not (view := tokens.data).c_contiguous:
            return tokens.tobytes()
        return view.cast("B")
    return as_key(tokens)


def check_rest(query: bytes | memoryview, num_bytes: int) -> None:
    """Checks the token ids of a query after the first `num_bytes` bytes, which matched; raises TokenError."""
    size = len(query) - num_bytes
    if size == TOKEN_BYTES:  # all but the token that a model goes on from
        if query[num_bytes + _HIGH_BYTE] >= _SIGN:
            raise _bad_token(token_ids(query))
    elif size > _STRIDED:
        if np.minimum.reduce(token_ids(query)[num_bytes // TOKEN_BYTES :]) < 0:
            raise _bad_token(token_ids(query))
    elif size > 0 and not bytes(query[num_bytes + _HIGH_BYTE :: TOKEN_BYTES]).isascii():
        raise _bad_token(token_ids(query))


def _as_array(tokens: Tokens) -> npt.NDArray[Any]:
    if isinstance(tokens, (str, bytes, bytearray)):
        raise TokenError(f"token ids must be integers, not {type(tokens).__name__}: encode the text first")
    given: Any = tokens
    if getattr(given, "is_meta", False):
        raise TokenError('token ids must have values, and a torch tensor on the device "meta" has none')
    try:
        # A torch tensor may lie on another device, or be a lazy view.
        ids: npt.NDArray[Any] = np.asarray(given.numpy(force=True) if hasattr(given, "detach") else given)
    except (ValueError, TypeError) as error:  # numpy: lists of different lengths; torch: a tensor that is sparse, say
        raise TokenError(f"token ids must be a flat list of integers in [0, 2**31): {error}") from None
    if isinstance(tokens, (list, tuple)) and ids.ndim == 1 and ids.dtype.kind in "iu":
        _refuse_bools(tokens, ids)
    return ids


def _refuse_bools(tokens: Sequence[int], ids: npt.NDArray[Any]) -> None:
    """A bool among integers has become 0 or 1: in a long list only those are looked at."""
    suspects = tokens if len(tokens) < _FEW else [tokens[at] for at in np.flatnonzero(ids <= 1).tolist()]
    if not _BOOLS.isdisjoint(map(type, suspects)):
        at, value = next((at, bool(token)) for at, token in enumerate(tokens) if type(token) in _BOOLS)
        raise TokenError(f"token id {value} at position {at} is not an integer in [0, 2**31)")


def _bad_token(ids: npt.NDArray[Any]) -> TokenError:
    """The error that names the first id that is not a token."""
    if ids.ndim == 0:
        return TokenError(f"token ids must be a flat list, not the single value {ids.item()!r}: put it into a list")
    if ids.ndim != 1:
        return TokenError(f"token ids must be a flat list, not an array of shape {ids.shape}")
    for position, value in enumerate(ids.tolist()):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LIMIT:
            return TokenError(f"token id {value!r} at position {position} is not an integer in [0, 2**31)")
    return TokenError(f"token ids must be integers, not {ids.dtype}")


def one_token(token: int | np.integer[Any]) -> bytes:
    """The key of a single token id; raises TokenError like `as_key`."""
    if type(token) is int and 0 <= token < _LIMIT:
        return token.to_bytes(TOKEN_BYTES, sys.byteorder)
    # Callers without type checks pass arrays of one value, which numpy would take for the value.
    given: object = token
    if not isinstance(given, (int, np.integer)):
        raise TokenError(f"a token id must be an integer in [0, 2**31), not {given!r}")
    return as_key([token])


def token_ids(key: bytes | memoryview) -> npt.NDArray[np.int32]:
    """The token ids of a key, int32, read-only, without a copy."""
    return np.frombuffer(key, dtype=np.int32)


def common_bytes(key: bytes, other: bytes | memoryview, offset: int = 0) -> int:
    """How many bytes of `key` equal those of `other` from `offset` on, in whole tokens.

    Cost: short keys by one xor of long integers, long ones by numpy in blocks, so that the end of the run is found
    without reading what follows it.
    """
    size = min(len(key), len(other) - offset)
    if size <= _SHORT:
        mine, theirs = key[:size], bytes(other[offset : offset + size])
        if mine == theirs:
            return size
        differ = int.from_bytes(mine, "little") ^ int.from_bytes(theirs, "little")
        return ((differ & -differ).bit_length() - 1) // (8 * TOKEN_BYTES) * TOKEN_BYTES
    for start in range(0, size, _BLOCK):
        count = min(_BLOCK, size - start) // TOKEN_BYTES
        left = np.frombuffer(key, dtype=np.int32, count=count, offset=start)
        right = np.frombuffer(other, dtype=np.int32, count=count, offset=offset + start)
        differs = left != right
        first = int(differs.argmax())
        if differs[first]:
            return start + first * TOKEN_BYTES
    return size


_SHORT = 512
_BLOCK = 1 << 16
