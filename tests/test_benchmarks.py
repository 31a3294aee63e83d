"""The benchmarks run, measure what they say, and add up; no peer is needed, and nothing looks at how long it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plots, report, table
from benchmarks.cases import CLAIMS, GROUPS, Claim, Figure
from benchmarks.clock import group_size, limited, time_groups
from benchmarks.command import SCRIPTS, main, prepared, sizes_of
from benchmarks.impls import IMPLS, load
from benchmarks.peers import PACKAGES, ROOT
from benchmarks.rounds import run_groups
from benchmarks.rows import Row, row_files
from benchmarks.workload import chat, leaves
from tests.sources import sources

#: sizes at which a run takes a fraction of a second
TINY: dict[str, dict[str, Any]] = {
    "match": {"tokens": 64, "others": 3},
    "insert": {"tokens": 64, "others": 3},
    "turn": {"conversations": 12, "turns": 3, "live": 3},
    "anatomy": {"conversations": 60, "scale": 0.1},
    "deep": {"turns": 3},
    "evict": {"leaves": 300},
    "allocate": {"pages": 16},
    "pack": {"batch": 3, "pages": 4},
    "memory": {"leaves": 300},
    "tokens": {"tokens": 32},
    "copies": {"layers": 1, "heads": 1, "head_dim": 2},
    "attention": {"batch": 2, "shared": 32, "unique": 5, "heads": 1, "head_dim": 8},
}
MEASURES = {
    "match": {"match"},
    "insert": {"insert", "request"},
    "turn": {"turn"},
    "anatomy": {"start", "extend", "finish"},
    "deep": {"hold and release"},
    "evict": {"allocation", "extension", "request", "evict"},
    "allocate": {"allocate and release"},
    "pack": {"pack", "concatenate", "again, same tables", "again, tables grown", "step"},
    "memory": {"bytes a leaf", "bytes a token", "bytes a page"},
    "tokens": {"list", "array", "torch int64", "numpy int64", "numpy int32", "tobytes", "bytes beyond the key"},
    "copies": {"copy"},
    "attention": {"run, plain", "run, hybrid", "pack and plan, plain", "pack and plan, hybrid", "dense"},
}


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few calls of each instead of a quarter of a second."""

    def briefly(_seconds: float, *, least: int = 5, most: int = 300) -> Any:  # noqa: ANN401  a range
        return range(min(most, max(8, least)))

    for script in SCRIPTS:
        module = import_module(f"benchmarks.{script}")
        if hasattr(module, "limited"):
            monkeypatch.setattr(module, "limited", briefly)


# -- scripts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_measures_what_it_says_with_our_own(script: str) -> None:
    rows = prepared(script, "ours", TINY[script])()
    assert {row["measure"] for row in rows} == MEASURES[script]
    for row in rows:
        assert row["options"] == sizes_of(script) | TINY[script]
        assert row["n"] >= 1
        assert row["versions"].keys() == {"implementation", "python", "numpy", "torch"}
        if row["unit"] == "us":
            assert 0 < row["p10"] <= row["median"] <= row["p90"]
        assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("shape", ["chunks", "branches"])
def test_a_long_prompt_is_found_in_any_shape(shape: str) -> None:
    (row,) = prepared("match", "ours", {"tokens": 3 * 4096, "others": 2, "shape": shape})()
    assert row["measure"] == "match"


def test_a_conversation_with_branches_is_found_as_a_whole() -> None:
    (row,) = prepared("deep", "ours-whole-pages", {"turns": 3, "shape": "branches"})()
    assert row["measure"] == "hold and release"


def test_a_run_may_be_taken_again() -> None:
    run = prepared("evict", "ours", {"leaves": 300})
    assert [row["measure"] for row in run()] == [row["measure"] for row in run()]


def test_a_script_runs_alone_and_prints_rows() -> None:
    command = [sys.executable, "-m", "benchmarks.match", "--tokens", "64", "--others", "2"]
    env = os.environ | {"PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    (row,) = (json.loads(line) for line in done.stdout.splitlines())
    assert (row["script"], row["options"]["tokens"]) == ("match", 64)


def test_the_command_line_prints_a_row_for_each_measure(capsys: pytest.CaptureFixture[str]) -> None:
    main("insert", sizes_of("insert"), ["--tokens", "64", "--others", "2"])
    assert [json.loads(line)["measure"] for line in capsys.readouterr().out.splitlines()] == ["insert", "request"]


def test_whole_pages_find_less_than_tails() -> None:
    rates = {
        impl: prepared("turn", impl, TINY["turn"])()[0]["facts"]["hit_rate"] for impl in ("ours", "ours-whole-pages")
    }
    assert 0 < rates["ours-whole-pages"] < rates["ours"] < 1


# -- timing and work ---------------------------------------------------------------------------------------------------


def test_each_group_is_made_between_two_timed_stretches() -> None:
    events: list[str] = []

    def groups() -> Any:  # noqa: ANN401  a generator
        for name in "ab":
            events.append(f"make {name}")
            yield [name, name]

    times = time_groups(events.append, groups())
    assert events == ["make a", "a", "a", "make b", "b", "b"]
    assert len(times) == 2


def test_slow_calls_are_timed_one_by_one_and_counting_stops() -> None:
    assert group_size(lambda _: sum(range(100_000)), None) == 1
    assert list(limited(0, least=3)) == [0, 1, 2]
    assert list(limited(1e6, most=4)) == [0, 1, 2, 3]


def test_the_chat_serves_each_turn_once_in_order_and_prompts_grow_by_what_was_said() -> None:
    work = chat(num_conversations=5, num_turns=3, num_live=2)
    assert len(work.turns) == 15
    assert sorted({len(turn.prompt) for turn in work.turns}) == [1100, 1400, 1700]
    said = {turn.prompt.tobytes() + turn.reply.tobytes() for turn in work.turns}
    later = [turn for turn in work.turns if len(turn.prompt) > 1100]
    assert all(turn.prompt[:-100].tobytes() in said for turn in later)
    assert work.capacity == (1000 + 15 * 300) * 3 // 10 // 64 * 64


def test_leaves_differ_in_their_first_token() -> None:
    found = list(leaves(50, 4))
    assert len({int(prompt[0]) for prompt in found}) == len(found) == 50
    assert all(np.array_equal(a, b) for a, b in zip(found, leaves(50, 4), strict=True))


# -- cases and rounds --------------------------------------------------------------------------------------------------


def test_every_script_is_in_the_list_and_tiny_here() -> None:
    with_options = {
        path.removeprefix("benchmarks/").removesuffix(".py")
        for path in sources("benchmarks")
        if "\nOPTIONS = " in (ROOT / path).read_text(encoding="utf-8")
    }
    assert with_options == set(SCRIPTS) == TINY.keys() == MEASURES.keys()


def test_every_implementation_has_an_environment_and_ours_an_adapter() -> None:
    assert {impl.peer for impl in IMPLS.values()} == {None, *PACKAGES}
    for peer in PACKAGES:
        assert (ROOT / "benchmarks" / "requirements" / f"{peer}.txt").is_file()
    assert load("ours-whole-pages").whole_pages


def test_every_claim_is_about_something_that_is_run() -> None:
    run = [(group.script, impl, sizes_of(group.script) | group.options) for group in GROUPS for impl in group.impls]
    for claim in CLAIMS:
        for figure in filter(None, (claim.ours, claim.peer)):
            assert (figure.script, figure.impl, sizes_of(figure.script) | figure.options) in run, claim.what
            if IMPLS[figure.impl].peer is None:
                assert figure.measure in MEASURES[figure.script], claim.what


def test_rounds_alternate_between_processes() -> None:
    (group,) = (group for group in GROUPS if group.script == "allocate" and group.options == {"pages": 128})
    served = group._replace(impls=("ours", "ours-whole-pages"))
    rows = list(run_groups([served], 2))
    order = [(row["round"], row["impl"]) for row in rows]
    assert order == [(1, "ours"), (1, "ours-whole-pages"), (2, "ours-whole-pages"), (2, "ours")]


def test_a_run_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ours failed"):
        list(run_groups([GROUPS[0]._replace(options={"tokens": -1}, impls=("ours",))], 1))


# -- table -------------------------------------------------------------------------------------------------------------


def rows_of(impl: str, *medians: float, measure: str = "match", unit: str = "us") -> list[Row]:
    """Rows as a run leaves them, one a round."""
    common: Row = {"script": "match", "impl": impl, "measure": measure, "unit": unit, "load": 1.0, "facts": {}, "n": 1}
    common |= {"versions": {"implementation": impl, "python": "3"}, "options": sizes_of("match")}
    common |= {"machine": {"cpu": "x", "cores": 2, "memory_gib": 3, "system": "y"}}
    return [common | {"round": at + 1, "median": median} for at, median in enumerate(medians)]


def claim_of(**limits: float) -> Claim:
    ours, peer = (Figure("match", impl, {"tokens": 1024}, "match") for impl in ("ours", "sglang-rust"))
    return Claim("match", ours, peer, **limits)


def test_a_ratio_is_the_median_of_the_ratios_within_each_round() -> None:
    rows = rows_of("ours", 1, 2, 4) + rows_of("sglang-rust", 10, 40, 16)
    found = table.judge(claim_of(at_least=10), rows)
    assert found.values == [10, 20, 4]
    assert (found.value, found.is_met) == (10, True)
    assert table.judge(claim_of(at_least=10.5), rows).is_met is False
    assert table.judge(claim_of(), rows).is_met is None


def test_a_ceiling_is_ours_over_the_other() -> None:
    found = table.judge(claim_of(at_most=1.5), rows_of("ours", 3) + rows_of("sglang-rust", 2))
    assert (found.value, found.is_met) == (1.5, True)


def test_bytes_speak_for_themselves() -> None:
    claim = Claim("memory", Figure("match", "ours", {}, "bytes a leaf"), None, at_most=700)
    found = table.judge(claim, rows_of("ours", 701, measure="bytes a leaf", unit="B"))
    assert (found.value, found.is_met) == (701, False)
    assert "| 701 B |" in table.markdown(rows_of("ours", 701, measure="bytes a leaf", unit="B"), [claim])


def test_only_rounds_that_both_sides_have_are_compared() -> None:
    assert table.judge(claim_of(), rows_of("ours", 1, 2, 3) + rows_of("sglang-rust", 5)).values == [5]
    assert "not run" in table.markdown(rows_of("ours", 1), [claim_of(at_least=2)])


@pytest.mark.parametrize(
    ("value", "text"), [(3.14159, "3.14 µs"), (1234.6, "1,230 µs"), (25_000, "25 ms"), (0.1, "0.1 µs")]
)
def test_times_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert table.quantity(value, "us") == text


def test_a_loss_is_told_with_its_factor() -> None:
    rows = rows_of("ours", 9) + rows_of("sglang-rust", 3) + rows_of("vllm", 10)
    text = report._losses(report.medians_of(rows, GROUPS[:1]))
    assert text == "- `match`, match, tokens 1024: SGLang, Rust core 3 µs, ours 9 µs (3 times as much)"


def test_every_place_of_the_page_is_filled(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401  a path
    pytest.importorskip("matplotlib", reason="plots: pip install 'seqattn[bench]'")
    (tmp_path / "match.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows_of("ours", 9)), encoding="utf-8"
    )
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    assert report.write_report() in (text := (tmp_path / "page.md").read_text(encoding="utf-8"))
    assert "{{" not in text
    drawn = {path.stem for path in (tmp_path / "pictures").glob("*.png")}
    assert drawn == {*plots.PICTURES, "gpu", "gpu_fixed"}
    assert all(f"performance/{name}.png" in text for name in drawn - {"gpu_fixed"})  # that one is the README's


def test_rows_of_the_gpu_benchmarks_are_left_to_them(tmp_path: Path) -> None:
    for name in ("match.jsonl", "gpu_attention.jsonl", "chat_baseline.jsonl", "evict.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in row_files(tmp_path)] == ["evict.jsonl", "match.jsonl"]
