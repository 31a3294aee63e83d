"""The part of docs/performance.md on whole models, from the rows that `chat_baseline` and `gpu_chat` left."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.table import RESULTS

__all__ = ["chat_parts"]

Rows = list[dict[str, Any]]

_WAYS = {
    "engine": "Engine",
    "cache each": "one `DynamicCache` for each conversation",
    "copies": "a kept cache of the system prompt, copied for each",
    "padded batch": "one padded batch, the model called by hand",
}


def chat_parts() -> dict[str, str]:
    """The parts of the page, by their names in the template."""
    cpu, gpu = _rows("chat_baseline"), _rows("gpu_chat_h200")
    return {
        "chat_cpu": _cpu(cpu),
        "chat_cpu_machine": _machine(cpu[0]),
        "chat_gpu_machine": _gpu_machine(gpu[0]),
        "chat_decode": _decode(gpu),
        "chat_facts": _facts(gpu),
        "chat_host": _host(gpu),
        "chat_ways": _ways(gpu),
    }


def _rows(name: str) -> Rows:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _machine(row: dict[str, Any]) -> str:
    machine, versions = row["machine"], row["versions"]
    return f"{machine['cpu']}, one thread, torch {versions['torch']}, transformers {versions['transformers']}."


def _gpu_machine(row: dict[str, Any]) -> str:
    versions = ", ".join(" ".join(pair) for pair in row["versions"].items())
    return f"One {row['device']}, {versions}."


def _cpu(rows: Rows) -> str:
    lines = [
        "| | KV of 32 conversations | first token of a new one | tokens per second, batch of 8 |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        kv = f"{row['kv_bytes'] / 1e6:,.0f} MB" if "kv_bytes" in row else ""
        first = f"{row['first_token_ms']:,.0f} ms" if "first_token_ms" in row else ""
        lines.append(f"| {_WAYS[row['impl']]} | {kv} | {first} | {row['tokens_per_s']:.1f} |")
    return "\n".join(lines)


#: what of a step is one launch
_GRAPHS = {"none": "no graphs", "attention": "graphs of the attention", "step": "one graph a step"}


def _decode(rows: Rows) -> str:
    """Decoding: who, tokens a second, milliseconds a step, and what the host needs."""
    hosts = {(row["packing"], row["graphs"]): row for row in rows if row["part"] == "host"}
    lines = ["| decoding | tokens per second | step | the CPU's work in it |", "|---|---:|---:|---:|"]
    for row in sorted((row for row in rows if "tokens_per_s" in row), key=lambda row: -row["tokens_per_s"]):
        host = hosts.get((row.get("packing"), row.get("graphs")))
        if "packing" in row:
            what = f"Engine, {row['packing']} packing, {_GRAPHS[row['graphs']]}"
            what += ", launched ahead" if row.get("ahead") else ""
        else:
            what = f"`generate` with a static cache, {'compiled' if row['part'] == 'compiled' else 'eager'}"
        cpu = "" if host is None else f"{host['host_us'] / 1e3:.2f} ms"
        lines.append(f"| {what} | {row['tokens_per_s']:,.0f} | {row['step_ms']:.2f} ms | {cpu} |")
    return "\n".join(lines)


def _facts(rows: Rows) -> str:
    """First tokens and the replay."""
    graphs = {"none": "without graphs", "auto": "with graphs"}
    lines = [
        f"- First token of {row['message']} new tokens after {row['cached']:,} cached, {graphs[row['graphs']]}: "
        f"{row['cached_ms']:.1f} ms; the same prompt cold: {row['cold_ms']:.1f} ms."
        for row in rows
        if row["part"] == "first"
    ]
    lines += [
        f"- The same beside {row['others']} that decode, {graphs[row['graphs']]}: {row['joins_ms']:.1f} ms; "
        f"the others pause for {row['pause_ms']:.1f} ms."
        for row in rows
        if row["part"] == "join"
    ]
    replay = next(row for row in rows if row["part"] == "replay")
    lines.append(
        f"- {replay['requests']:,} requests of a recorded trace in {replay['seconds']:.0f} s on {replay['pages']:,} "
        f"pages: {replay['evicted_pages']:,} pages evicted, {replay['checks']} times `check()`, {replay['pages_lost']} "
        "pages lost."
    )
    return "\n".join(lines)


def _host(rows: Rows) -> str:
    """What the engine adds to a bare forward on the CPU."""
    lines = [
        "| packing, graphs | bare | schedule | prepare | forward | sample | publish, accept | added | quartiles |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    parts = ("schedule", "prepare", "forward", "sample", "publish_and_accept")
    for row in (row for row in rows if row["part"] == "host"):
        us = [f"{row[f'{part}_us'] / 1e3:.2f}" for part in ("forward_without_attention", *parts)]
        added, low, high = (f"{row[name]:.1%}" for name in ("added_share", "added_share_low", "added_share_high"))
        last = [f"**{added}**", f"{low} to {high}"]
        if row["graphs"] == "step":
            last = [f"{row['host_share']:.1%} in all", ""]
        cells = [f"{row['packing']}, {_GRAPHS[row['graphs']]}", *us, *last]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ways(rows: Rows) -> str:
    """Ways to compute the same step, two and two."""
    found = [row for row in rows if row["part"] == "agree"]
    tokens = f"of {found[0]['tokens']:,} tokens"
    lines = [
        f"| {tokens} | the same | different, at most 1 step | at most 2 | most | error of the logits |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        cells = (row["equal"], row["apart_at_most_1_step"], row["apart_at_most_2_steps"])
        numbers = " | ".join(f"{cell:,}" for cell in cells)
        error, most = row["mean_relative_error"], row["most_apart_steps"]
        lines.append(f"| {row['way']} against {row['against']} | {numbers} | {most:g} | {error:.4f} |")
    return "\n".join(lines)
