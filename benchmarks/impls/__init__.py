"""The implementations under measurement, by name: where each lives and what its adapter is.

An adapter is as thin as the scheduler that the implementation was written for: it builds the arguments that the
scheduler would build, calls what the scheduler calls, and returns what the scheduler reads.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

__all__ = ["IMPLS", "Impl", "load"]


class Impl(NamedTuple):
    """Where an implementation is found.

    Attributes:
        peer: whose environment it needs; None for the project's own.
        adapter: `module:name` of what the scripts use.
        title: its name in tables.
    """

    peer: str | None
    adapter: str
    title: str


IMPLS = {
    "ours": Impl(None, "benchmarks.impls.ours:Ours", "seqattn + radix"),
    "ours-whole-pages": Impl(None, "benchmarks.impls.ours:OursWholePages", "seqattn + radix, whole pages"),
    "ours-history": Impl(None, "benchmarks.impls.ours:OursWithHistory", "seqattn + radix, with history"),
    "sglang-rust": Impl("sglang", "benchmarks.impls.sglang:SGLangRust", "SGLang, Rust core"),
    "sglang-classic": Impl("sglang", "benchmarks.impls.sglang:SGLangClassic", "SGLang, classic"),
    "vllm": Impl("vllm", "benchmarks.impls.vllm:VLLM", "vLLM"),
    "seqattn-0.0.2": Impl("seqattn-0.0.2", "benchmarks.impls.seqattn_0_0_2:Old", "seqattn 0.0.2"),
}


def load(impl: str) -> Any:  # noqa: ANN401  adapters share no base class: a peer has what its scheduler calls
    """The adapter of an implementation; this must be the Python of its environment."""
    module, name = IMPLS[impl].adapter.split(":")
    return getattr(import_module(module), name)
