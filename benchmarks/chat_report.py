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


def _decode(rows: Rows) -> str:
    """Decoding: who, tokens a second, milliseconds a step, and what the host needs."""
    hosts = {(row["packing"], row["in_graph"]): row for row in rows if row["part"] == "host"}
    lines = ["| decoding | tokens per second | step | of which the CPU needs |", "|---|---:|---:|---:|"]
    for row in sorted((row for row in rows if "tokens_per_s" in row), key=lambda row: -row["tokens_per_s"]):
        host = hosts.get((row.get("packing"), row.get("in_graph")))
        if "packing" in row:
            what = f"Engine, {row['packing']} packing, {'CUDA graphs' if row['in_graph'] else 'eager'}"
        else:
            what = f"`generate` with a static cache, {'compiled' if row['part'] == 'compiled' else 'eager'}"
        cpu = "" if host is None else f"{host['host_us'] / 1e3:.2f} ms" if row["in_graph"] else "all of it"
        lines.append(f"| {what} | {row['tokens_per_s']:,.0f} | {row['step_ms']:.2f} ms | {cpu} |")
    return "\n".join(lines)


def _facts(rows: Rows) -> str:
    """First tokens, agreement, replay and the host."""
    lines = [
        f"- First token of {row['message']} new tokens after {row['cached']:,} cached: {row['cached_ms']:.1f} ms; the "
        f"same prompt cold: {row['cold_ms']:.1f} ms."
        for row in rows
        if row["part"] == "first"
    ]
    agree, replay = (next(row for row in rows if row["part"] == part) for part in ("agree", "replay"))
    lines.append(
        f"- Hybrid and plain packing on the same state choose the same greedy token in {agree['equal']:,} of "
        f"{agree['tokens']:,} cases. In the other {agree['different']} the two best logits are at most "
        f"{agree['most_apart_steps']:g} bfloat16 steps apart ({agree['apart_at_most_2_steps']} of them at most 2); the "
        f"logits of the two ways differ by up to {agree['largest_difference_of_a_logit_steps']:g} steps."
    )
    lines.append(
        f"- {replay['requests']:,} requests of a recorded trace in {replay['seconds']:.0f} s on {replay['pages']:,} "
        f"pages: {replay['evicted_pages']:,} pages evicted, {replay['checks']} times `check()`, {replay['pages_lost']} "
        "pages lost."
    )
    hosts = [row for row in rows if row["part"] == "host"]
    bare = [row["forward_without_attention_us"] for row in hosts]
    added = [f"{row['host_us'] / min(bare) - 1:.0%} ({row['packing']})" for row in hosts if not row["in_graph"]]
    whole = [f"{row['host_us'] / min(bare):.0%} ({row['packing']})" for row in hosts if row["in_graph"]]
    lines.append(
        f"- On the host, the model's eager forward with attention replaced by nothing takes {min(bare) / 1e3:.1f} to "
        f"{max(bare) / 1e3:.1f} ms in four measurements. On top of the least of them an eager step of the engine takes "
        f"{', '.join(added)}: more than the 20% that were promised. With CUDA graphs a whole step takes the CPU "
        f"{', '.join(whole)} of it."
    )
    return "\n".join(lines)
