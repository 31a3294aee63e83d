"""`python -m radix replay`: what it prints where, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from radix.__main__ import main
from tests.traces import ROOT

LINES = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 3]},
]

Output = pytest.CaptureFixture[str]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


@pytest.fixture
def text_trace(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    line = {"timestamp": 0, "session_id": "a", "input": "one two three", "output": ""}
    path.write_text(f"{json.dumps(line)}\n" * 2)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `python -m radix` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["radix", *map(str, arguments)])
    with pytest.raises(SystemExit) as raised:
        main()
    assert isinstance(raised.value.code, int)
    return raised.value.code


def test_json_is_one_object_on_stdout_and_progress_goes_to_stderr(trace: Path) -> None:
    command = [sys.executable, "-m", "radix", "replay", str(trace), "--page-size", "512", "--json"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert (report["hit_tokens"], report["forked_pages"], report["capacity_pages"]) == (1100 + 512, 1, None)
    assert "3/3" in done.stderr


def test_options_reach_the_cache(trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    options = ["--page-size", 512, "--whole-pages", "--capacity-fraction", 0.5, "--limit", 2, "--format", "mooncake"]
    assert run(monkeypatch, "replay", trace, "--json", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["requests"], report["capacity_pages"], report["whole_pages"]) == (2, 1, True)
    assert report["hit_tokens"] == 512


def test_a_table_shows_the_figures(trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    assert run(monkeypatch, "replay", trace, "--page-size", 512, "--capacity-pages", 9) == 0
    out = capsys.readouterr().out
    assert "1,612" in out
    assert "57.57%" in out
    assert run(monkeypatch, "replay", trace, "--whole-pages") == 0
    assert "unbounded" in capsys.readouterr().out


def test_help_explains_every_option(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    assert run(monkeypatch, "replay", "--help") == 0
    out = capsys.readouterr().out
    for option in ("--format", "--page-size", "--capacity-pages", "--capacity-fraction", "--policy", "--whole-pages"):
        assert option in out
    for option in ("TRACE", "--limit", "--tokenizer", "--json"):
        assert option in out


def test_a_bad_trace_is_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"hash_ids": []}\n')
    assert run(monkeypatch, "replay", bad, "--json") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"error: {bad}, line 1: the field 'timestamp' is missing")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_a_trace_that_is_not_utf_8_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, encoding: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes('{"timestamp": 0, "session_id": "a", "input": "ä", "output": ""}\n'.encode(encoding))
    assert run(monkeypatch, "replay", bad, "--json") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {bad}, line 1: not UTF-8 (invalid ")


def test_a_trace_may_begin_with_a_byte_order_mark(
    text_trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    text_trace.write_bytes(b"\xef\xbb\xbf" + text_trace.read_bytes())
    assert run(monkeypatch, "replay", text_trace, "--json") == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--capacity-pages", 3, "--capacity-fraction", 0.5], "exclude each other"),
        (["--capacity-pages", 0], "0 is not in the range"),
        (["--capacity-fraction", 1.5], "1.5 is not in the range"),
        (["--page-size", "x"], "'x' is not a valid integer"),
        (["--policy", "fifo"], "'fifo' is not 'lru'"),
    ],
)
def test_options_that_cannot_be_are_refused(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, options: list[object], message: str
) -> None:
    assert run(monkeypatch, "replay", trace, *options) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setitem(sys.modules, "rich_click", None)
    assert run(monkeypatch, "replay", "--help") == 2
    assert capsys.readouterr().err == "error: rich_click is not installed: pip install 'seqattn[cli]'\n"


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_makes_token_ids_of_text(
    text_trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """A plug-in of tiktoken's brings an encoding of single bytes and one merge, without a download."""
    tiktoken = pytest.importorskip("tiktoken", reason="the tokenizer of text traces: pip install tiktoken")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    ranks = {bytes([i]): i for i in range(256)} | {b"t" + b"w": 256}
    toy = {"name": "toy", "pat_str": r"\S+|\s+", "mergeable_ranks": ranks, "special_tokens": {"<|end|>": 257}}
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", {"toy": lambda: toy})
    assert run(monkeypatch, "replay", text_trace, "--tokenizer", "toy", "--page-size", 1, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["input_tokens"], report["hit_tokens"]) == (24, 12)  # "tw" is one token of thirteen letters' twelve
    assert run(monkeypatch, "replay", text_trace, "--tokenizer", "none") == 2
    assert "tiktoken knows no encoding 'none': use one of toy" in capsys.readouterr().err


def test_without_a_tokenizer_text_is_its_bytes(
    text_trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    assert run(monkeypatch, "replay", text_trace, "--page-size", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["hit_tokens"] == 13


def test_a_tokenizer_that_is_not_installed_names_what_to_install(
    text_trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert run(monkeypatch, "replay", text_trace, "--tokenizer", "cl100k_base") == 2
    assert "tiktoken is not installed: pip install 'seqattn[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ConnectionError("no route\n  to host"), "(ConnectionError: no route to host)"),
        (ValueError("hash mismatch"), "(ValueError: hash mismatch)"),
    ],
)
def test_a_tokenizer_that_cannot_be_downloaded_is_one_line_with_the_reason(
    text_trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, failure: Exception, reason: str
) -> None:
    def fail(name: str) -> None:
        raise failure

    tiktoken = _tiktoken_with("far")
    vars(tiktoken)["get_encoding"] = fail
    monkeypatch.setitem(sys.modules, "tiktoken", tiktoken)
    assert run(monkeypatch, "replay", text_trace, "--tokenizer", "far") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("error: the encoding 'far' cannot be loaded: ")
    assert line.endswith(reason)


def test_what_the_download_library_raises_is_among_the_errors_that_are_caught() -> None:
    requests = pytest.importorskip("requests", reason="what tiktoken downloads with: pip install tiktoken")
    assert issubclass(requests.exceptions.RequestException, OSError)


def test_a_tokenizer_for_hashes_is_refused(trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", _tiktoken_with("any"))
    assert run(monkeypatch, "replay", trace, "--tokenizer", "any") == 2
    assert "a mooncake trace has no text to tokenize" in capsys.readouterr().err


def _tiktoken_with(name: str) -> types.ModuleType:
    module = types.ModuleType("tiktoken")
    vars(module)["list_encoding_names"] = lambda: [name]
    vars(module)["get_encoding"] = lambda name: types.SimpleNamespace(encode_ordinary=list)
    return module
