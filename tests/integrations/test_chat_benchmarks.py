"""The benchmarks of chat run at tiny sizes, and what they say besides times is right."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chat_baseline, gpu_chat
from benchmarks.gpu_chat_ways import PAIRS

pytest.importorskip("transformers", reason="needs the extra chat")


def rows_of(main: Any, monkeypatch: pytest.MonkeyPatch, file: Path, *arguments: str) -> list[dict[str, Any]]:  # noqa: ANN401
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    main()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_baseline_counts_bytes_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--tiny", "--conversations", "4", "--system", "100", "--batch", "2", "--new", "4"]
    file = tmp_path / "rows.jsonl"
    rows = {row["impl"]: row for row in rows_of(chat_baseline.main, monkeypatch, file, *sizes, "--out", str(file))}
    token_bytes = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, elements, bytes
    assert rows["cache each"]["kv_bytes"] == 4 * (100 + chat_baseline.MESSAGE) * token_bytes
    assert rows["copies"]["kv_bytes"] == rows["cache each"]["kv_bytes"] + 100 * token_bytes
    # Six full pages of the system prompt are shared; each conversation has its tail, its message and a token: 29. The
    # system prompt's own tail page gave way to a fuller one.
    assert rows["engine"]["kv_bytes"] == (6 + 4 * 2) * 16 * token_bytes
    assert all(row["tokens_per_s"] > 0 for row in rows.values())


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace like Mooncake's: 30 requests, three on each of ten prefixes."""
    path = tmp_path / "trace.jsonl.gz"
    records = [
        {
            "input_length": 512 * 5 - 40,
            "output_length": 64 + i,
            "hash_ids": [i % 10, 100 + i % 10, 200 + i, 300 + i, 400],
        }
        for i in range(30)
    ]
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)
    return path


def test_the_parts_for_the_gpu_run_and_lose_no_page(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ["host", "agree", "decode", "first", "join", "replay", "static"]
    options = ["--tiny", "--out", str(tmp_path), "--trace", str(trace), "--only", *parts]
    rows = rows_of(gpu_chat.main, monkeypatch, tmp_path / "chat.jsonl", *options)
    assert not [row for row in rows if "error" in row]
    by_part = {part: [row for row in rows if row["part"] == part] for part in parts}
    (replay,) = by_part["replay"]
    assert [(row["way"], row["against"]) for row in by_part["agree"]] == PAIRS
    for agree in by_part["agree"]:
        assert agree["tokens"] == gpu_chat.TINY.batch * gpu_chat.TINY.steps
        assert agree["equal"] + agree["different"] == agree["tokens"]
        assert agree["mean_relative_error"] < 1e-5, "in float32 every way is the truth"
    assert (replay["requests"], replay["finished"], replay["pages_lost"]) == (30, 30, 0)
    assert replay["cached_tokens"] == 20 * 32, "two pages of each prefix, for two of its three requests"
    decoded = [(row["packing"], row["graphs"], row["ahead"]) for row in by_part["decode"]]
    assert decoded == [(*variant, ahead) for variant in gpu_chat.VARIANTS for ahead in (False, True)]
    firsts = [(row["cached"], row["graphs"]) for row in by_part["first"]]
    assert firsts == [(cached, graphs) for cached in gpu_chat.TINY.cached for graphs in ("none", "auto")]
    assert [row["graphs"] for row in by_part["join"]] == ["none", "auto"]


def test_a_part_that_fails_leaves_a_row_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(work: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_chat.PARTS, "host", fails)
    options = ["--tiny", "--out", str(tmp_path), "--only", "host", "replay"]
    rows = rows_of(gpu_chat.main, monkeypatch, tmp_path / "chat.jsonl", *options)
    assert [row.get("error", row.get("skipped")) for row in rows] == [
        "RuntimeError: no such kernel",
        "give a trace with --trace",
    ]
