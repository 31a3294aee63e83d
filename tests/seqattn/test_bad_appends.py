"""What `append_kv` refuses: nothing is written then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqattn.cache import PagedKVCacheManager
from seqattn.errors import LengthError, PageError, SharedPageError, TensorError
from seqattn.packed import FlashInferHybridData, FlashInferPackedData, HybridLevel
from tests.seqattn.truth import int32


def cache() -> PagedKVCacheManager:
    return PagedKVCacheManager(8, 4, 2, 4, torch.float32, "cpu")


def rows(count: int) -> torch.Tensor:
    return torch.ones(count, 2, 4)


TWO = {"kv_page_indices": [0, 1, 2], "kv_page_indptr": [0, 2, 3], "kv_last_page_len": [1, 3]}


def two(**changes: list[int]) -> FlashInferPackedData:
    """Sequences of 5 and 3 tokens on pages 0 1 and 2."""
    return FlashInferPackedData.trusted(*(int32(*values) for values in {**TWO, **changes}.values()))


NESTED = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(1, 4)], layout=torch.jagged)
HYBRID = FlashInferHybridData(
    (HybridLevel(int32(0, 1, 2), int32(0, 2, 3), int32(0, 1, 2), int32(1, 3)),), torch.arange(2)
)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": rows(4)[:, :1]}, TensorError, r"keys has shape \[4, 1, 4\], not \[n, 2, 4\]"),
        ({"values": rows(4)[0]}, TensorError, r"values has shape \[2, 4\]"),
        ({"keys": rows(4).half()}, TensorError, "keys has dtype torch.float16 but the cache holds torch.float32"),
        ({"values": rows(4).to("meta")}, TensorError, "values is on meta but the cache on cpu"),
        ({"keys": rows(4).tolist()}, TensorError, "keys must be a tensor, not list"),
        ({"keys": rows(4).to_sparse()}, TensorError, r"keys is a torch\.sparse_coo tensor: make it dense first"),
        ({"values": rows(4).to_sparse()}, TensorError, r"values is a torch\.sparse_coo tensor"),
        ({"values": rows(4).to_mkldnn()}, TensorError, r"values is a torch\._mkldnn tensor"),
        ({"values": NESTED}, TensorError, "values is a nested tensor: make it dense first"),
        ({"values": rows(5)}, LengthError, "4 keys and 5 values, but append_indptr_cpu ends at 4"),
        ({"packed": HYBRID}, TensorError, "append_kv needs plain FlashInferPackedData, not FlashInferHybridData"),
        ({"packed": two(kv_last_page_len=[5, 3])}, LengthError, r"kv_last_page_len\[0\] is 5 .* in \[1, 4\]"),
        ({"indptr": int32(0, 4)}, LengthError, "append_indptr_cpu has 2 entries, not 2 sequences"),
        ({"indptr": int32(0, 2, 5)}, LengthError, "append_indptr_cpu ends at 5"),
        ({"indptr": int32(1, 2, 4)}, LengthError, r"must start at 0 and never decrease, not \[1, 2, 4\]"),
        ({"indptr": int32(0, 5, 4)}, LengthError, r"must start at 0 and never decrease, not \[0, 5, 4\]"),
        ({"indptr": int32(0, 0, 4)}, LengthError, "sequence 1 of the batch has 3 tokens but 4 are appended"),
        ({"indptr": torch.tensor([0.0, 2, 4])}, TensorError, "append_indptr_cpu must be an int32 or int64 tensor"),
        ({"indptr": [0, 2, 4]}, TensorError, r"append_indptr_cpu must be .* not \[0, 2, 4\]"),
        ({"indptr": int32(0, 2, 4).to("meta")}, TensorError, "append_indptr_cpu is on meta: build it on the CPU"),
        ({"layer": 1}, LengthError, r"layer 1 is not in \[0, 1\)"),
        ({"layer": -1}, LengthError, "layer must be an integer of at least 0, not -1"),
        ({"packed": two(kv_page_indices=[0, 9, 2])}, PageError, r"page 9 is not in \[0, 8\)"),
        ({"packed": two(kv_page_indices=[0, 5, 2])}, PageError, "page 5 is free and cannot be written"),
        ({"packed": two(kv_page_indices=[0, 4, 2])}, SharedPageError, "page 4 has 2 references"),
        ({"packed": two(kv_page_indices=[0, 2, 2])}, PageError, "page 2 would be written for 2 sequences of the batch"),
    ],
)
def test_a_bad_append_is_refused_and_writes_nothing(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    manager = cache()
    manager.allocate(5)
    manager.ref([4])
    arguments = {"keys": rows(4), "values": rows(4), "packed": two(), "indptr": int32(0, 2, 4), "layer": 0, **changes}
    layer = arguments.pop("layer")
    with pytest.raises(error, match=message):
        manager.append_kv(*arguments.values(), layer=layer)
    assert not manager.key_cache.any()
    assert not manager.value_cache.any()
    assert manager.ref_count.tolist() == [1, 1, 1, 1, 2, 0, 0, 0]


def test_a_sequence_that_appends_nothing_may_share_its_last_page() -> None:
    manager = cache()
    manager.allocate(3)
    manager.ref([1])
    manager.append_kv(rows(1), rows(1), two(), int32(0, 0, 1))
    assert manager.key_cache[2, 2].all()
    assert manager.key_cache.count_nonzero() == 8


def test_shared_pages_that_are_only_read_do_not_matter() -> None:
    manager = cache()
    manager.allocate(3)
    manager.ref([0])
    manager.append_kv(rows(1), rows(1), FlashInferPackedData(int32(0, 1), int32(0, 2), int32(1)), int32(0, 1))
    assert manager.key_cache[1, 0].any()
