"""Decode attention on the CPU: each sequence reads its own pages, or a shared prefix is read once.

pack, plain / pack, hybrid   packing and planning of one step
run, plain / run, hybrid     one layer: float32, one query row a sequence
dense                        torch's scaled_dot_product_attention over the same KV, gathered beforehand
"""

from __future__ import annotations

from typing import Any

from benchmarks.clock import Sample, limited, time_groups
from benchmarks.command import TakeSamples, main

OPTIONS = {"batch": 32, "shared": 2048, "unique": 64, "heads": 4, "head_dim": 64, "page_size": 16}
QUERY_HEADS_PER_HEAD = 4


def prepare(adapter: Any, *, batch: int, shared: int, unique: int, **shape: int) -> TakeSamples:  # noqa: ANN401  impls.load
    """One prefix, and a tail for each sequence."""
    import torch

    torch.set_num_threads(1)
    num_pages = (shared + batch * (unique + shape["page_size"])) // shape["page_size"]
    package, manager = adapter.seqattn, _noise(adapter.seqattn, num_pages, **shape)
    descriptor = package.CacheDescriptor(manager)
    descriptor.allocate([0], [shared])
    for seq_id in range(1, batch):
        descriptor.fork(0, seq_id)
    descriptor.allocate(range(batch), [unique] * batch)
    num_heads = shape["heads"] * QUERY_HEADS_PER_HEAD
    q = torch.randn(batch, num_heads, shape["head_dim"], generator=torch.Generator().manual_seed(3))
    attention = package.PagedAttention(manager, num_heads)
    packs = {"plain": descriptor.pack_for_flashinfer, "hybrid": descriptor.pack_hybrid_for_flashinfer}

    def take() -> dict[str, Sample]:
        samples, outputs, seq_ids = {}, [], list(range(batch))
        for name, pack in packs.items():
            attention.plan(pack(seq_ids))
            outputs.append(attention.run(q))
            samples[f"run, {name}"] = Sample(time_groups(attention.run, ([q] for _ in limited(0.5))))
            steps = ([pack] for _ in limited(0.2))
            samples[f"pack and plan, {name}"] = Sample(time_groups(lambda pack: attention.plan(pack(seq_ids)), steps))
        torch.testing.assert_close(*outputs)
        dense = _dense(manager, descriptor, seq_ids)
        torch.testing.assert_close(outputs[0], dense(q))
        samples["dense"] = Sample(time_groups(dense, ([q] for _ in limited(0.5))))
        return samples

    return take


def _noise(package: Any, num_pages: int, *, page_size: int, heads: int, head_dim: int) -> Any:  # noqa: ANN401  a module
    """KV memory in float32, filled."""
    import torch

    manager = package.PagedKVCacheManager(num_pages, page_size, heads, head_dim, torch.float32, torch.device("cpu"))
    for seed, cache in enumerate((manager.key_cache, manager.value_cache)):
        cache.normal_(generator=torch.Generator().manual_seed(seed))
    return manager


def _dense(manager: Any, descriptor: Any, seq_ids: list[int]) -> Any:  # noqa: ANN401  either package's
    """The same attention over contiguous KV."""
    import torch

    tables = torch.tensor([descriptor.seq_id_to_data[seq_id].kv_page_indices for seq_id in seq_ids])
    num_tokens = descriptor.num_tokens(seq_ids[0])
    keys, values = (
        cache[tables].flatten(1, 2)[:, :num_tokens].transpose(1, 2).contiguous()
        for cache in (manager.key_cache, manager.value_cache)
    )

    def run(q: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
        return out[:, :, 0]

    return run


if __name__ == "__main__":
    main("attention", OPTIONS)
