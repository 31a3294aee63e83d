"""A batch whose sequences share prefixes, packed in levels: attention reads each shared page once, not once a sequence.

Six questions under one system prompt, most about a document, make a forest:

    system ─┬─ document 0 ── questions 0, 3          level 0   system       read once for all six
            ├─ document 1 ── questions 1, 2, 4       level 1   documents    read once for two or three
            └─ question 5                            level 2   questions    each read by its own sequence

    python examples/shared_prefix_batch.py
"""

import argparse

import numpy as np
import torch

from radix import PrefixCache
from seqattn import FlashInferHybridData, PagedAttention, PagedKVCacheManager

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 64, 16
DOCUMENTS = [0, 1, 1, 0, 1, None]  # of each question, in the order in which they came


def prompts() -> list[np.ndarray]:
    """Token ids: the system prompt, perhaps a document, a question."""
    draw = np.random.default_rng(0)
    system, *documents = (draw.integers(0, 32_000, length, dtype=np.int32) for length in (200, 500, 300))
    questions = [draw.integers(0, 32_000, length, dtype=np.int32) for length in (30, 21, 48, 17, 9, 40)]
    parts = [[system, *([] if d is None else [documents[d]])] for d in DOCUMENTS]
    return [np.concatenate([*shared, question]) for shared, question in zip(parts, questions, strict=True)]


def show(data: FlashInferHybridData) -> None:
    """Prints each level: which sequences a group has, and how many pages they read together."""
    order = data.order.tolist()
    for number, level in enumerate(data.levels):
        print(f"level {number}")
        rows, pages = level.qo_indptr.tolist(), level.kv_page_indptr.tolist()
        for group in range(level.num_groups):
            sequences = order[rows[group] : rows[group + 1]]
            print(f"  {pages[group + 1] - pages[group]:3} pages read by {', '.join(map(str, sequences))}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    manager = PagedKVCacheManager(128, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    manager.key_cache.normal_()  # as if a model had computed the keys and values
    manager.value_cache.normal_()
    cache = PrefixCache(manager)
    batch = list(range(len(DOCUMENTS)))
    for seq_id, prompt in zip(batch, prompts(), strict=True):
        cache.start(seq_id, prompt)
        cache.publish(seq_id)  # so that the next one shares its pages while both run
    plain = cache.pack_for_flashinfer(batch)
    hybrid = cache.pack_hybrid_for_flashinfer(batch)
    show(hybrid)

    attention = PagedAttention(manager, NUM_HEADS)
    q = torch.randn(len(batch), NUM_HEADS, HEAD_DIM)  # one decode step: a row for each sequence
    attention.plan(plain)
    expected = attention.run(q)
    attention.plan(hybrid)
    error = float((attention.run(q) - expected).abs().max())
    assert error < 1e-5, f"hybrid attention is off by {error}"
    reads = [len(plain.kv_page_indices), sum(len(level.kv_page_indices) for level in hybrid.levels)]
    print(f"pages read: {reads[0]} plain, {reads[1]} hybrid; outputs equal to {error:.0e}")
