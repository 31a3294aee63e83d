"""Steps whose small kernels are launched early, as `benchmarks.gpu_parts` tries them, on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu_attention import Step
from benchmarks.gpu_by_hand import NUM_LAYERS
from benchmarks.gpu_parts import AS_PROMISED, tried
from benchmarks.gpu_shapes import PAGE_SIZE, Shape, one_prefix
from seqattn.attention.fa3_sources import why_fa3_cannot_be_used
from tests.gpu.batches import MOST_ERROR, attend, relative_error
from tests.seqattn.truth import Batch

pytestmark = pytest.mark.gpu

KERNELS = {
    "gathering early": {"_gather_early", "_merge"},
    "merging early": {"_gather", "_merge_early"},
    "both early": {"_gather_early", "_merge_early"},
    "merging early behind level 0": {"_gather", "_merge_early"},
}


@pytest.mark.parametrize("shape", [one_prefix(64, 8192, 512), Shape(128, 2, 1024, 8, 2048, 64)], ids=str)
def test_every_way_tried_gives_what_attention_does(shape: Shape) -> None:
    if torch.cuda.get_device_capability()[0] != 9 or why_fa3_cannot_be_used() is not None:
        pytest.skip("fa3 is not computed here")
    torch.manual_seed(0)
    step = Step(shape, AS_PROMISED)
    data = step.packed(step.cost_model)
    step.attention.plan(data)
    step.layers()
    impl: Any = step.attention._impl
    assert len(data.levels) > 1
    batch = Batch(PAGE_SIZE, step.tables, step.lens.tolist(), [1] * len(step.tables))
    queries = torch.randn(2, NUM_LAYERS, *step.q.shape, dtype=step.q.dtype, device=step.q.device)
    expected = [[attend(step.manager, batch, q, layer=i)[0] for i, q in enumerate(each)] for each in queries]
    used = torch.empty_like(queries[0])

    def layers() -> list[torch.Tensor]:
        return [step.attention.run(used[layer], layer=layer) for layer in range(NUM_LAYERS)]

    for name, way in tried(step, data).items():
        impl._launcher._compiled.clear()
        graph = torch.cuda.CUDAGraph()
        with way:
            scratch = step.attention._prepared.scratch
            layers()
            with torch.cuda.graph(graph):
                replayed = layers()
            for run in (graph.replay, graph.replay, layers):
                for q, right in zip(queries, expected, strict=True):
                    used.copy_(q)
                    for poisoned in (scratch.gathered, scratch.part_out, scratch.part_lse, *replayed):
                        poisoned.fill_(float("nan"))
                    for found, true in zip(run() or replayed, right, strict=True):
                        assert relative_error(found, true) < MOST_ERROR[torch.bfloat16], name
        compiled = impl._launcher._compiled
        if name in KERNELS and impl._launcher._can_repeat:  # else nothing is kept of what was launched
            assert {key[0] for key in compiled} == KERNELS[name]
            for key, kernel in compiled.items():
                is_early = key[0].endswith("_early")
                assert kernel.metadata.launch_pdl == is_early
                assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == is_early
