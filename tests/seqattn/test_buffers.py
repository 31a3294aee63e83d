"""Packed data that somebody still has is never written over; memory that nobody has is used again."""

from __future__ import annotations

import numpy as np
import torch

from seqattn import CacheDescriptor, PageAllocator
from seqattn.buffers import Buffers


def test_an_array_in_use_is_not_handed_out_again() -> None:
    buffers = Buffers()
    taken = [buffers.take(100) for _ in range(10)]
    assert len({array.__array_interface__["data"][0] for array in taken}) == 10


def test_an_array_that_only_a_tensor_uses_is_in_use() -> None:
    buffers = Buffers()
    tensors = [torch.from_numpy(buffers.take(100)) for _ in range(10)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 10
    views = [tensor[3:7] for tensor in tensors]
    del tensors
    assert buffers.take(100).__array_interface__["data"][0] not in {view.data_ptr() - 12 for view in views}


def test_an_array_that_nobody_uses_is_handed_out_again() -> None:
    buffers = Buffers()
    first = buffers.take(100).__array_interface__["data"][0]
    assert buffers.take(90).__array_interface__["data"][0] == first
    keep = buffers.take(80)
    assert keep.__array_interface__["data"][0] == first
    assert buffers.take(80).__array_interface__["data"][0] != first


def test_packed_data_stays_as_it_is_while_the_batch_goes_on() -> None:
    descriptor = CacheDescriptor(PageAllocator(1000, 2))
    packs, truths = [], []
    descriptor.allocate([1, 2, 3], [5, 6, 7])
    for step in range(20):
        descriptor.allocate_decoding([1, 2, 3])
        ids = [1, 2, 3][step % 3 :]
        packs.append(descriptor.pack_for_flashinfer(ids))
        truths.append(np.concatenate([descriptor.seq_id_to_data[seq_id].pages for seq_id in ids]).tolist())
    assert [pack.kv_page_indices.tolist() for pack in packs] == truths
