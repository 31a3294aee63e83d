"""The whole way: descriptor, memory, packing and attention, against lists of the keys and values of each sequence."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from seqattn.attention import PagedAttention
from seqattn.cache import PagedKVCacheManager
from seqattn.descriptor import CacheDescriptor
from seqattn.errors import NoPageError


def test_the_worked_forest_comes_out_of_a_descriptor() -> None:
    """A and B are system prompts; conversations fork from them and grow; x has none."""
    descriptor = CacheDescriptor(PagedKVCacheManager(16, 16, 1, 1, torch.float32, "cpu"))
    descriptor.allocate(["A", "B"], [48, 32])
    for prompt, conversation, num_tokens in (("A", "a0", 10), ("A", "a1", 20), ("A", "a2", 16), ("B", "b0", 5)):
        descriptor.fork(prompt, conversation)
        descriptor.extend(conversation, num_tokens)
    descriptor.fork("B", "b1")
    descriptor.extend("b1", 33)
    descriptor.allocate(["x"], [7])
    ids = ["a0", "a1", "a2", "b0", "b1", "x"]
    data = descriptor.pack_hybrid_for_flashinfer(ids)
    assert [level.qo_indptr.tolist() for level in data.levels] == [[0, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert [level.kv_page_indptr.tolist() for level in data.levels] == [[0, 3, 5, 5], [0, 1, 3, 4, 5, 8, 9]]
    shared, own = (level.kv_page_indices.tolist() for level in data.levels)
    assert (shared, own) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12, 13])
    assert [level.kv_last_page_len.tolist() for level in data.levels] == [[16, 16, 0], [10, 4, 16, 5, 1, 7]]
    assert data.order.tolist() == [0, 1, 2, 3, 4, 5]
    data.check(16)
    plain = descriptor.pack_for_flashinfer(ids)
    assert plain.kv_page_indptr.tolist() == [0, 4, 9, 13, 16, 21, 22]
    assert [pages.tolist() for pages, _ in plain.unpack()] == [pages.tolist() for pages in data.unpack()]


class Life:
    """Sequences that grow and fork; beside the cache, every sequence's keys and values in a tensor of its own."""

    def __init__(self, page_size: int, kv_layout: str) -> None:
        self.manager = PagedKVCacheManager(24, page_size, 2, 4, torch.float32, "cpu", kv_layout)
        self.descriptor = CacheDescriptor(self.manager)
        self.attention = PagedAttention(self.manager, 4)
        self.generator = torch.Generator().manual_seed(page_size)
        self.kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def step(self, new: dict[int, int]) -> None:
        """Appends tokens to some sequences and attends with them, plain and hybrid."""
        ids, lens = list(new), list(new.values())
        self.descriptor.allocate(ids, lens)
        keys, values = self.random(sum(lens), 2, 4), self.random(sum(lens), 2, 4)
        packed = self.descriptor.pack_for_flashinfer(ids)
        indptr = torch.tensor([0, *lens]).cumsum(0)
        self.manager.append_kv(keys, values, packed, indptr)
        for i, *rows in zip(ids, torch.split(keys, lens), torch.split(values, lens), strict=True):
            old = self.kv.get(i, (torch.empty(0, 2, 4), torch.empty(0, 2, 4)))
            self.kv[i] = (torch.cat((old[0], rows[0])), torch.cat((old[1], rows[1])))
        q = self.random(sum(lens), 4, 4)
        expected = torch.cat([self.dense(i, rows) for i, rows in zip(ids, torch.split(q, lens), strict=True)])
        hybrid = self.descriptor.pack_hybrid_for_flashinfer(ids, query_lens=lens)
        hybrid.check(self.manager.page_size)
        for data in (packed, hybrid):
            self.attention.plan(data, query_lens=lens)
            assert torch.allclose(self.attention.run(q), expected, rtol=1e-5, atol=1e-5)

    def dense(self, i: int, q: torch.Tensor) -> torch.Tensor:
        """Causal attention of the last rows of a sequence over its own list of keys and values."""
        keys, values = (part.repeat_interleave(2, dim=1) for part in self.kv[i])
        scores = torch.einsum("mhd,nhd->hmn", q, keys) / 2
        after = torch.ones(len(q), len(keys)).triu(len(keys) - len(q) + 1).bool()
        return torch.einsum("hmn,nhd->mhd", scores.masked_fill(after, -torch.inf).softmax(-1), values)


@given(st.data(), st.sampled_from([1, 2, 4, 16]), st.sampled_from(["NHD", "HND"]))
def test_attention_sees_what_was_appended_through_growth_and_forks(
    data: st.DataObject, page_size: int, kv_layout: str
) -> None:
    life = Life(page_size, kv_layout)
    for _ in range(data.draw(st.integers(1, 6))):
        running = sorted(life.kv)
        if running and data.draw(st.sampled_from([False, True])):
            source, copy = data.draw(st.sampled_from(running)), len(running)
            try:
                life.descriptor.fork(source, copy)
            except NoPageError:
                break
            life.kv[copy] = life.kv[source]
        ids = data.draw(st.lists(st.integers(0, len(life.kv)), min_size=1, max_size=4, unique=True))
        try:
            life.step({i: data.draw(st.integers(1, 5)) for i in ids})
        except NoPageError:
            break
    life.descriptor.check()
    life.descriptor.release(sorted(life.kv))
    assert life.manager.available_pages_count == 24
