"""A page table for every head: some KV heads keep all tokens, others only the last few, and use fewer pages.

`HeadIDGenerator` gives each (sequence, KV head) an id, and the id is used as a sequence id: the cache holds one head to
a page, the batch of attention has a row for each sequence and KV head.

    sequence 0, head 0   keeps all 300 tokens      19 pages of 16
    sequence 0, head 1   keeps the last 32          2 pages

    python examples/headwise.py
"""

import argparse

import torch

from seqattn import CacheDescriptor, HeadIDGenerator, PagedAttention, PagedKVCacheManager

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, PAGE_SIZE = 4, 2, 32, 16  # GROUP_SIZE query heads read one KV head
KEPT = [None, 32, 100, 32]  # tokens that each KV head keeps; None for all
LENGTHS = [300, 90, 20]  # tokens of each sequence


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one row, the obvious way: q [group, dim], k and v [tokens, dim]."""
    return torch.softmax(q @ k.T / HEAD_DIM**0.5, dim=-1) @ v


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    manager = PagedKVCacheManager(100, PAGE_SIZE, num_heads=1, head_dim=HEAD_DIM, dtype=torch.float32, device="cpu")
    descriptor = CacheDescriptor(manager)
    heads = HeadIDGenerator(NUM_KV_HEADS)
    every = [(seq, head) for seq in range(len(LENGTHS)) for head in range(NUM_KV_HEADS)]
    ids = [heads.get_head_id(seq, head) for seq, head in every]

    # What a model would compute: keys, values [tokens, KV heads, dim] of each sequence. Each head keeps its last ones.
    keys, values = ([torch.randn(length, NUM_KV_HEADS, HEAD_DIM) for length in LENGTHS] for _ in range(2))
    kept = [min(LENGTHS[seq], KEPT[head] or LENGTHS[seq]) for seq, head in every]
    kept_keys, kept_values = (
        [full[seq][-num:, head] for (seq, head), num in zip(every, kept, strict=True)] for full in (keys, values)
    )

    descriptor.allocate(ids, kept)
    packed = descriptor.pack_for_flashinfer(ids)
    append_indptr = torch.tensor([0, *kept]).cumsum(0)
    manager.append_kv(torch.cat(kept_keys)[:, None], torch.cat(kept_values)[:, None], packed, append_indptr)

    q = torch.randn(len(every), GROUP_SIZE, HEAD_DIM)  # one decode step: a row for each sequence and KV head
    attention = PagedAttention(manager, num_qo_heads=GROUP_SIZE)
    attention.plan(packed)
    out = attention.run(q)
    expected = torch.stack([dense(*row) for row in zip(q, kept_keys, kept_values, strict=True)])
    error = float((out - expected).abs().max())
    assert error < 1e-5, f"paged attention is off by {error}"

    print("pages of each head    " + "".join(f"{f'head {head}':>9}" for head in range(NUM_KV_HEADS)))
    for seq, length in enumerate(LENGTHS):
        pages = [len(descriptor.seq_id_to_data[heads.get_head_id(seq, head)].pages) for head in range(NUM_KV_HEADS)]
        print(f"sequence {seq}, {length:3} tokens " + "".join(f"{num:9}" for num in pages))
    used, all_kept = manager.num_pages - manager.available_pages_count, sum(-(-n // PAGE_SIZE) for n in LENGTHS)
    print(f"{used} pages instead of {all_kept * NUM_KV_HEADS}; attention equals the dense one to {error:.0e}")
