"""flashinfer's own wrappers, called as its documentation has it: what `gpu_attention` compares with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.gpu_shapes import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu_attention import Step

__all__ = ["NUM_LAYERS", "cascade_by_hand", "plain_by_hand"]

#: layers of a step, each with memory of its own
NUM_LAYERS = 4


def plain_by_hand(step: Step) -> tuple[Callable[[], None], Callable[[], None]]:
    """The decode wrapper of flashinfer as its documentation has it: plan, and a run of every layer."""
    import flashinfer

    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    indptr = torch.from_numpy(np.concatenate(([0], np.cumsum(step.lens // PAGE_SIZE))).astype(np.int32))
    indices = torch.from_numpy(np.concatenate(step.tables)).cuda()
    last = torch.full((len(step.tables),), PAGE_SIZE, dtype=torch.int32)
    manager = step.manager
    sizes = (step.num_qo_heads, manager.num_heads, manager.head_dim, PAGE_SIZE)

    def plan() -> None:
        wrapper.plan(indptr, indices, last, *sizes, q_data_type=manager.dtype, kv_data_type=manager.dtype)

    def run() -> None:
        for layer in range(NUM_LAYERS):
            wrapper.run(step.q, manager.layer_tensors(layer))

    return plan, run


def cascade_by_hand(step: Step) -> tuple[Callable[[], None], Callable[[], None]]:
    """The MultiLevelCascadeAttentionWrapper of flashinfer with every level of the forest."""
    import flashinfer

    data = step.packed(None)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(data.levels), workspace, "NHD")
    manager = step.manager
    sizes = (step.num_qo_heads, manager.num_heads, manager.head_dim, PAGE_SIZE)
    names = ("qo_indptr", "kv_page_indptr", "kv_page_indices", "kv_last_page_len")
    tables = [[getattr(level, name) for level in data.levels] for name in names]
    tables[2] = [indices.cuda() for indices in tables[2]]

    def plan() -> None:
        wrapper.plan(*tables, *sizes, q_data_type=manager.dtype, kv_data_type=manager.dtype)

    def run() -> None:
        for layer in range(NUM_LAYERS):
            wrapper.run(step.q, manager.layer_tensors(layer))

    return plan, run
