"""Steps with shared levels in fa3 have the same results every time they run.

Compiled with flashinfer's own barrier 181 of 20,482 steps of the first batch differed on an H200, four runs each; with
the one of `seqattn.attention.fa3_sources` none of 42,181.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu_shapes import PAGE_SIZE, Shape, tables_of
from seqattn.attention import PagedAttention
from seqattn.attention.calls import Choice
from seqattn.attention.fa3_sources import why_fa3_cannot_be_used
from seqattn.attention.plan import plan_batch
from seqattn.cache import PagedKVCacheManager
from seqattn.hybrid import pack_hybrid

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

NUM_RUNS = 4000


@pytest.mark.parametrize(
    ("shape", "choices"),
    [
        (Shape(128, 1, 1024, 16, 512, 512), [Choice("fa3"), Choice("fa3"), Choice("decode")]),
        (Shape(128, 1, 16384, 1, 0, 256), [Choice("fa3", 2), Choice("decode")]),
    ],
    ids=str,
)
def test_every_run_of_a_step_has_the_same_results(shape: Shape, choices: list[Choice]) -> None:
    if torch.cuda.get_device_capability()[0] != 9 or why_fa3_cannot_be_used() is not None:
        pytest.skip("fa3 is not computed here")
    tables = tables_of(shape, 3, in_line=True)
    lens = np.array([len(table) * PAGE_SIZE for table in tables])
    manager = PagedKVCacheManager(1 + max(int(t.max()) for t in tables), PAGE_SIZE, 8, 128, torch.bfloat16, "cuda")
    for cache in manager.get_memory_tensors():
        cache.normal_()
    attention = PagedAttention(manager, 32, backend="flashinfer")
    data = pack_hybrid(tables, lens, page_size=PAGE_SIZE, query_lens=None, cost_model=None)
    attention.plan(data)
    plan = plan_batch(manager, data, None, causal=True)
    attention._prepared = attention._impl.prepare(plan, choices)  # type: ignore[call-arg]
    assert [call.kernel for call in attention._prepared.work.calls] == [choice.kernel for choice in choices]
    q = torch.randn(len(tables), 32, 128, device="cuda", dtype=torch.bfloat16)
    first = attention.run(q)
    differ = torch.zeros(first.shape[:2], dtype=torch.int64, device="cuda")
    for _ in range(NUM_RUNS):
        torch.cuda.synchronize()  # what the device does at the same time decides who is late
        differ += (attention.run(q) != first).any(-1)
    assert int(differ.sum()) == 0, f"rows and heads that differed: {differ.nonzero().tolist()[:20]}"


def test_the_copy_is_what_is_compiled() -> None:
    """Or flashinfer's own files are sound by now, or nothing is compiled here."""
    from flashinfer.jit import env, gen_batch_prefill_module

    from seqattn.attention.fa3_sources import without_early_arrival

    if why_fa3_cannot_be_used() is not None:
        pytest.skip("fa3 is not computed here")
    import flashinfer.prefill

    epilogue = Path(env.FLASHINFER_INCLUDE_DIR, "flashinfer/attention/hopper/epilogue.cuh").read_text("utf-8")
    is_changed = flashinfer.prefill.gen_batch_prefill_module is not gen_batch_prefill_module
    assert is_changed == (without_early_arrival(epilogue) is not None)
    bf16, options = torch.bfloat16, (0, False, False, False)
    for backend in ("fa2", "fa3"):
        spec = flashinfer.prefill.gen_batch_prefill_module(backend, bf16, bf16, bf16, torch.int32, 128, 128, *options)
        assert spec.name.endswith("_one_barrier") == (backend == "fa3" and is_changed)
        if is_changed and backend == "fa3":
            copied = Path(spec.extra_include_dirs[0], "flashinfer/attention/hopper/epilogue.cuh").read_text("utf-8")
            assert copied == without_early_arrival(epilogue)
