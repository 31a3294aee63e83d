"""Readers of the trace formats; each yields requests in replay order.

- `mooncake`: a line is a request with `timestamp`, `input_length`, `output_length` and the `hash_ids` of its 512-token
  blocks, of which the last may be partial.
- `sessions`: a line is a session with a `block_size` and nested `requests`, each with `t`, `in`, `out` and the
  `hash_ids` of its whole blocks; sub-agents nest requests of their own.
- `text`: a line is a call with `timestamp`, `session_id`, `input` (the whole prompt) and `output`.

Hash ids are numbered anew, densely in order of first appearance, so that the token ids made from them stay small.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from radix.replay.lines import PathLike, Record, read_records
from radix.replay.request import BlockRequest, Request, TokenRequest
from seqattn.errors import BadValueError, TraceError

__all__ = ["FORMATS", "Encode", "detect_format", "read_mooncake", "read_sessions", "read_text", "read_trace"]

#: turns a prompt into its token ids.
Encode: TypeAlias = Callable[[str], list[int]]
#: hash id to block number; a new hash id gets the next number.
Numbers: TypeAlias = "defaultdict[int, int]"

#: a field of each format's lines that no other format has.
_TELLING_FIELDS = {"mooncake": "hash_ids", "sessions": "requests", "text": "input"}
FORMATS = tuple(_TELLING_FIELDS)

_NUM_TOKEN_IDS = 2**31

# The sessions carry no absolute times, so how they interleave is a convention: published hit counts were computed with
# these three numbers.
_START_SEED = 7
_MEAN_START_GAP = 60.0
_MAX_IDLE = 300.0


def read_trace(path: PathLike, trace_format: str = "auto", *, encode: Encode | None = None) -> Iterator[Request]:
    """Yields the requests of a trace.

    Args:
        path: a .gz, .xz or plain file with one JSON object a line.
        trace_format: one of `FORMATS`, or `auto` to decide by the first line's fields.
        encode: the tokenizer of text prompts; None replays their UTF-8 bytes. The other formats have no text.

    Raises:
        TraceError: a line that cannot be read, with its number; raised when that line is reached.
        BadValueError: an unknown format, or a tokenizer for a format without text.
        OSError: the file cannot be opened.
    """
    if trace_format not in (*FORMATS, "auto"):
        raise BadValueError(f"format {trace_format!r} is unknown: use auto, {', '.join(FORMATS)}")
    chosen = detect_format(path) if trace_format == "auto" else trace_format
    if chosen == "text":
        return read_text(path, encode=encode)
    if encode is not None:
        raise BadValueError(f"a {chosen} trace has no text to tokenize: leave the tokenizer out")
    return read_mooncake(path) if chosen == "mooncake" else read_sessions(path)


def detect_format(path: PathLike) -> str:
    """The format of a trace, by the fields of its first line.

    Raises:
        TraceError: the file is empty, or the fields are those of no known format.
    """
    first = next(read_records(path), None)
    if first is None:
        raise TraceError(str(path), 1, "the file is empty: a trace has one JSON object a line")
    for trace_format, field in _TELLING_FIELDS.items():
        if field in first.fields:
            return trace_format
    raise first.error(f"fields {sorted(first.fields)} fit no known format: name it ({', '.join(FORMATS)})")


def read_mooncake(path: PathLike, *, block_size: int = 512) -> Iterator[BlockRequest]:
    """Yields the requests of a Mooncake trace in the order of the file, reading one line at a time."""
    numbers: Numbers = defaultdict(count().__next__)
    for record in read_records(path):
        record.number("timestamp")
        record.count("output_length")
        num_tokens = record.count("input_length")
        blocks = _blocks(record, numbers, num_hash_ids=-(-num_tokens // block_size))
        _check_token_ids(record, len(numbers) * block_size)
        yield BlockRequest(blocks=blocks, block_size=block_size, num_tokens=num_tokens)


def read_text(path: PathLike, *, encode: Encode | None = None) -> Iterator[TokenRequest]:
    """Yields the prompts of a text trace in the order of the file, reading one line at a time."""
    for record in read_records(path):
        record.number("timestamp")
        record.text("session_id")
        record.text("output")
        prompt = record.text("input")
        try:
            utf8 = prompt.encode()
        except UnicodeEncodeError as error:
            raise record.error(f"'input' is not valid Unicode ({error})") from error
        ids = np.frombuffer(utf8, dtype=np.uint8) if encode is None else np.array(encode(prompt), dtype=np.int32)
        yield TokenRequest(ids)


def read_sessions(path: PathLike) -> Iterator[BlockRequest]:
    """Yields the requests of all sessions, interleaved; reads the whole file first.

    Sessions start one after the other, with seeded exponential gaps of 60 s on average; inside a session a pause counts
    at most 300 s; a sub-agent's times are relative to its start, and it shares the hash ids of its session. The tokens
    past a prompt's last whole block have no hash id: they get token ids that no other request has.
    """
    gaps, start, block_size = random.Random(_START_SEED), 0.0, None
    entries: list[tuple[float, int, int, BlockRequest]] = []
    num_blocks = num_tail_tokens = 0
    for k, session in enumerate(read_records(path)):
        start += gaps.expovariate(1.0 / _MEAN_START_GAP)
        block_size = _block_size(session, block_size)
        numbers: Numbers = defaultdict(count(num_blocks).__next__)
        calls = _calls(session, start, block_size, numbers)
        entries += [(time, k, j, request) for j, (time, request) in enumerate(calls)]
        num_blocks += len(numbers)
        num_tail_tokens += sum(request.num_tokens % block_size for _, request in calls)
        _check_token_ids(session, num_blocks * block_size + num_tail_tokens)
    entries.sort(key=lambda entry: entry[:3])
    yield from _with_tails((request for *_, request in entries), num_blocks)


def _block_size(session: Record, block_size: int | None) -> int:
    """The session's block size, which all sessions of a file must share."""
    own = session.count("block_size", least=1)
    if own != (block_size or own):
        raise session.error(f"block_size {own} differs from {block_size} of the sessions before: split the file")
    if session.fields.get("hash_id_scope", "local") != "local":
        raise session.error(f"hash_id_scope must be 'local', not {session.fields['hash_id_scope']!r}")
    return own


def _calls(session: Record, start: float, block_size: int, numbers: Numbers) -> list[tuple[float, BlockRequest]]:
    """The session's requests in order of time, each with the moment of its replay; tails are not numbered yet."""
    # A stable sort: requests of the same moment keep the order in which the file nests them.
    timed = sorted(_flatten(session), key=lambda entry: entry[0])
    calls = []
    now, before = start, timed[0][0] if timed else 0.0
    for time, record in timed:
        now += min(time - before, _MAX_IDLE)
        before = time
        record.count("out")
        num_tokens = record.count("in")
        blocks = _blocks(record, numbers, num_hash_ids=num_tokens // block_size)
        calls.append((now, BlockRequest(blocks=blocks, block_size=block_size, num_tokens=num_tokens)))
    return calls


def _flatten(session: Record) -> Iterator[tuple[float, Record]]:
    """Every request of a session with its time, sub-agents' requests where the sub-agent stands."""
    todo = [(0.0, record) for record in reversed(session.records("requests"))]
    while todo:
        base, record = todo.pop()
        time = base + record.number("t")
        if record.fields.get("type") == "subagent":
            todo.extend((time, nested) for nested in reversed(record.records("requests")))
        else:
            yield time, record


def _with_tails(requests: Iterator[BlockRequest], num_blocks: int) -> Iterator[BlockRequest]:
    """Numbers the tokens past each prompt's last whole block, from the first id that no block has."""
    tail_start: int | None = None
    for request in requests:
        if tail_start is None:
            tail_start = num_blocks * request.block_size
        num_tail_tokens = request.num_tokens % request.block_size
        yield attrs.evolve(request, tail_start=tail_start) if num_tail_tokens else request
        tail_start += num_tail_tokens


def _blocks(record: Record, numbers: Numbers, num_hash_ids: int) -> npt.NDArray[np.int32]:
    """The record's hash ids as block numbers.

    Raises:
        TraceError: there are more or fewer of them than the prompt's length asks for.
    """
    hash_ids = record.integers("hash_ids")
    if len(hash_ids) != num_hash_ids:
        raise record.error(
            f"{record.where + 'hash_ids'!r} has {len(hash_ids)} entries, but a prompt of this length has {num_hash_ids}"
            ": is the block size another one?"
        )
    return np.fromiter(map(numbers.__getitem__, hash_ids), dtype=np.int32, count=len(hash_ids))


def _check_token_ids(record: Record, num_token_ids: int) -> None:
    if num_token_ids > _NUM_TOKEN_IDS:
        raise record.error(f"the blocks so far need {num_token_ids} token ids, of which there are 2**31: cut the trace")
