"""The trace readers: what each format becomes, and what each bad line says."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radix.replay.lines import read_records
from radix.replay.readers import detect_format, read_mooncake, read_sessions, read_text, read_trace
from radix.replay.request import BlockRequest, TokenRequest
from seqattn.errors import BadValueError, TraceError

MOONCAKE = {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [40, 7]}
TEXT = {"timestamp": 1_760_428_270_556_890, "session_id": "a", "input": "héllo", "output": "ok"}


def call(t: float, hash_ids: list[int], num_tokens: int) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": num_tokens, "out": 1, "hash_ids": hash_ids}


def session(*requests: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {"id": "s", "block_size": 4, "requests": list(requests), **fields}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


# -- token ids ---------------------------------------------------------------------------------------------------------


def test_a_block_becomes_a_run_of_ids_that_no_other_block_has() -> None:
    request = BlockRequest(blocks=np.array([0, 7], np.int32), block_size=4, num_tokens=6)
    assert request.token_ids().tolist() == [0, 1, 2, 3, 28, 29]
    assert request.token_ids().dtype == np.int32


def test_tokens_past_the_blocks_are_a_tail() -> None:
    request = BlockRequest(blocks=np.array([0], np.int32), block_size=4, num_tokens=6, tail_start=80)
    assert request.token_ids().tolist() == [0, 1, 2, 3, 80, 81]


def test_a_prompt_without_blocks_is_all_tail() -> None:
    request = BlockRequest(blocks=np.empty(0, np.int32), block_size=4, num_tokens=3, tail_start=8)
    assert request.token_ids().tolist() == [8, 9, 10]


def test_hash_ids_are_numbered_in_order_of_first_appearance(tmp_path: Path) -> None:
    second = MOONCAKE | {"hash_ids": [40, 10**30], "input_length": 1024}
    first, other = read_mooncake(write(tmp_path / "t", MOONCAKE, second))
    assert (first.blocks.tolist(), other.blocks.tolist()) == ([0, 1], [0, 2])
    assert first.token_ids().tolist() == list(range(1000))
    assert other.token_ids().tolist() == [*range(512), *range(1024, 1536)]


def test_text_becomes_its_bytes_or_what_a_tokenizer_makes_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "t", TEXT)
    assert next(read_text(path)).token_ids().tolist() == list("héllo".encode())
    words = next(read_text(path, encode=lambda text: [len(text), 2**31 - 1]))
    assert words.token_ids().tolist() == [5, 2**31 - 1]


# -- interleaving of sessions ------------------------------------------------------------------------------------------


def test_calls_of_a_session_go_in_order_of_time_and_sub_agents_start_where_they_stand(tmp_path: Path) -> None:
    agent = {"t": 5.0, "type": "subagent", "requests": [call(0.0, [1], 5), call(9.0, [1], 7)]}
    path = write(tmp_path / "t", session(call(0.0, [1], 4), agent, call(5.0, [1, 2], 8), call(8.0, [1], 6)))
    # lengths 4 at 0 s, 5 at 5 s and 7 at 14 s (sub-agent), 8 at 5 s, 6 at 8 s; equal times in the order of the file
    assert [request.num_tokens for request in read_sessions(path)] == [4, 5, 8, 6, 7]


def test_equal_hash_ids_are_shared_inside_a_session_and_never_between_two(tmp_path: Path) -> None:
    path = write(tmp_path / "t", session(call(0, [1, 2], 8), call(1, [1, 3], 8)), session(call(0, [1], 4)))
    blocks = sorted(request.blocks.tolist() for request in read_sessions(path))
    assert blocks == [[0, 1], [0, 2], [3]]


def test_a_long_pause_counts_three_hundred_seconds(tmp_path: Path) -> None:
    """The first session's second call comes a million seconds later, and yet before the sessions that start late."""
    gaps = random.Random(7)
    starts = [gaps.expovariate(1 / 60)]
    while len(starts) < 30:
        starts.append(starts[-1] + gaps.expovariate(1 / 60))
    later = sum(start > starts[0] + 300 for start in starts)
    first = session(call(0, [1], 4), call(10**6, [2], 4))
    path = write(tmp_path / "t", first, *[session(call(0, [1], 4)) for _ in starts[1:]])
    blocks = [int(request.blocks[0]) for request in read_sessions(path)]
    assert 0 < later < 29
    assert blocks.index(1) == len(starts) - later


def test_tails_get_ids_that_nothing_else_has(tmp_path: Path) -> None:
    path = write(tmp_path / "t", session(call(0, [9], 7), call(1, [9], 6), call(2, [9], 4), call(3, [9], 5)))
    ids = [request.token_ids().tolist() for request in read_sessions(path)]
    assert ids == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 7, 8], [0, 1, 2, 3], [0, 1, 2, 3, 9]]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_file_is_read_whatever_its_compression(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"trace.jsonl{suffix}"
    path.write_bytes(compress(json.dumps(TEXT).encode() + b"\n\n"))
    assert len(list(read_trace(path))) == 1


def test_the_format_is_seen_by_the_first_line(tmp_path: Path) -> None:
    found = [detect_format(write(tmp_path / "t", line)) for line in (MOONCAKE, session(), TEXT)]
    assert found == ["mooncake", "sessions", "text"]


def test_a_trace_is_read_lazily_where_the_order_allows(tmp_path: Path) -> None:
    path = write(tmp_path / "t", MOONCAKE, "not json\n")
    assert isinstance(next(read_trace(path)), BlockRequest)
    assert isinstance(next(read_trace(write(tmp_path / "u", TEXT, "not json\n"))), TokenRequest)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{\n", "not JSON"),
        ("[1, 2]\n", "must be a JSON object, not \\[1, 2\\]"),
        ("[" * 100_000 + "\n", "not JSON"),
        ({"timestamp": 0}, "'output_length' is missing; there are \\['timestamp'\\]"),
        (MOONCAKE | {"timestamp": "now"}, "'timestamp' must be a finite number, not 'now'"),
        (MOONCAKE | {"timestamp": float("nan")}, "'timestamp' must be a finite number, not nan"),
        (MOONCAKE | {"input_length": -1}, "'input_length' must be an integer of at least 0, not -1"),
        (MOONCAKE | {"input_length": True}, "'input_length' must be an integer of at least 0, not True"),
        (MOONCAKE | {"input_length": 9.5}, "'input_length' must be an integer"),
        (MOONCAKE | {"hash_ids": 7}, "'hash_ids' must be a list of integers of at least 0, not 7"),
        (MOONCAKE | {"hash_ids": [1, True]}, "'hash_ids' must be a list of integers"),
        (MOONCAKE | {"hash_ids": [1, -1]}, "'hash_ids' must be a list of integers"),
        (MOONCAKE | {"hash_ids": [1] * 3}, "'hash_ids' has 3 entries, but a prompt of this length has 2"),
        (MOONCAKE | {"input_length": 1025}, "'hash_ids' has 2 entries, but a prompt of this length has 3"),
    ],
)
def test_a_bad_line_of_a_mooncake_trace_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "t", MOONCAKE, "\n", line)
    with pytest.raises(TraceError, match=f"t, line 3: .*{message}") as raised:
        list(read_mooncake(path))
    assert raised.value.line == 3
    assert len(str(raised.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (session(call(0, [1], 8)), r"'requests\[0\].hash_ids' has 1 entries, but a prompt of this length has 2"),
        (session({"t": 0}), r"the field 'requests\[0\].out' is missing"),
        (session({"type": "subagent", "t": 0, "requests": [{}]}), r"'requests\[0\].requests\[0\].t' is missing"),
        (session({"type": "subagent", "t": 0, "requests": [1]}), r"'requests\[0\].requests' must be a list of objects"),
        (session(block_size=0), "'block_size' must be an integer of at least 1, not 0"),
        (session(block_size=8), "block_size 8 differs from 4"),
        (session(hash_id_scope="global"), "hash_id_scope must be 'local', not 'global'"),
        (session() | {"requests": 3}, "'requests' must be a list of objects, not 3"),
    ],
)
def test_a_bad_session_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(TraceError, match=f"line 2: .*{message}"):
        list(read_sessions(write(tmp_path / "t", session(call(0, [1], 4)), line)))


@pytest.mark.parametrize("change", [{"input": 5}, {"output": None}, {"session_id": 1}, {"timestamp": "x"}])
def test_a_bad_call_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match=f"line 1: '{next(iter(change))}' must be"):
        list(read_text(write(tmp_path / "t", TEXT | change)))


def test_text_that_is_no_unicode_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 1: 'input' is not valid Unicode"):
        list(read_text(write(tmp_path / "t", TEXT | {"input": "\ud800"})))


def test_more_blocks_than_token_ids_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "t", MOONCAKE)
    with pytest.raises(TraceError, match=r"need 2147483650 token ids, of which there are 2\*\*31"):
        list(read_mooncake(write(path, MOONCAKE | {"input_length": 2**30 + 1 + 1}), block_size=2**30 + 1))


@pytest.mark.parametrize(("suffix", "broken"), [(".gz", b"plain"), (".xz", b"plain")])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, suffix: str, broken: bytes) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(broken)
    with pytest.raises(TraceError, match="line 1: the file cannot be read on from here"):
        next(read_trace(path))


def test_a_file_that_is_cut_short_is_named_with_the_line_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    lines = b"".join(json.dumps({"i": random.Random(i).random()}).encode() + b"\n" for i in range(20_000))
    path.write_bytes(gzip.compress(lines)[:-1000])
    with pytest.raises(TraceError, match="cannot be read on") as raised:
        list(read_records(path))
    assert raised.value.line > 10_000


def test_an_empty_file_and_unknown_fields_have_no_format(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 1: the file is empty"):
        read_trace(write(tmp_path / "t"))
    with pytest.raises(TraceError, match=r"line 1: fields \['a'\] fit no known format: name it \(mooncake, sessions"):
        read_trace(write(tmp_path / "t", {"a": 1}))


def test_an_unknown_format_and_a_tokenizer_without_text_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "t", MOONCAKE)
    with pytest.raises(BadValueError, match="'csv' is unknown"):
        read_trace(path, "csv")
    with pytest.raises(BadValueError, match="a mooncake trace has no text"):
        read_trace(path, encode=lambda text: [1])


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none")
