"""Steps whose small kernels are launched early, as `benchmarks.gpu_parts` tries them, on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu_attention import Step
from benchmarks.gpu_by_hand import NUM_LAYERS
from benchmarks.gpu_parts import AS_PROMISED, tried
from benchmarks.gpu_shapes import PAGE_SIZE, Shape, one_prefix
from tests.gpu.batches import MOST_ERROR, attend, relative_error
from tests.seqattn.truth import Batch

pytestmark = pytest.mark.gpu

KERNELS = {
    "gathering early": {"_gather_early", "_merge"},
    "merging early": {"_gather", "_merge_early"},
    "merging early behind level 0": {"_gather", "_merge_early"},
}


@pytest.mark.parametrize("shape", [one_prefix(64, 8192, 512), Shape(128, 2, 1024, 8, 2048, 64)], ids=str)
def test_every_way_tried_gives_what_attention_does(shape: Shape) -> None:
    torch.manual_seed(0)
    step = Step(shape, AS_PROMISED)
    data = step.packed(step.cost_model)
    step.attention.plan(data)
    step.layers()
    impl: Any = step.attention._impl
    assert len(data.levels) > 1
    batch = Batch(PAGE_SIZE, step.tables, step.lens.tolist(), [1] * len(step.tables))
    expected = [attend(step.manager, batch, step.q, layer=layer)[0] for layer in range(NUM_LAYERS)]
    for name, way in tried(step, data).items():
        impl._launcher._compiled.clear()
        graph = torch.cuda.CUDAGraph()
        with way:
            eager = [step.attention.run(step.q, layer=layer) for layer in range(NUM_LAYERS)]
            with torch.cuda.graph(graph):
                replayed = [step.attention.run(step.q, layer=layer) for layer in range(NUM_LAYERS)]
        if name in KERNELS:
            assert {key[0] for key in impl._launcher._compiled} == KERNELS[name]
        for out in replayed:
            out.fill_(float("nan"))
        graph.replay()
        for found, right in zip((*eager, *replayed), expected * 2, strict=True):
            assert relative_error(found, right) < MOST_ERROR[torch.bfloat16], name
