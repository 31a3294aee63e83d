"""A paged KV cache, and what turns sequences into the page lists that attention kernels read.

    token ids ──▶ page table of a sequence ──▶ packed int32 tensors ──▶ attention
                  CacheDescriptor              FlashInferPackedData     PagedAttention
                  over PagedKVCacheManager     FlashInferHybridData

One step of serving, and who does what:

    manager = PagedKVCacheManager(1024, 16, num_heads=8, head_dim=128, dtype=torch.float16, device="cpu")
    descriptor = CacheDescriptor(manager)
    attention = PagedAttention(manager, num_qo_heads=32)

    descriptor.allocate([1, 2], [100, 150])           # pages for the tokens of two sequences
    packed = descriptor.pack_for_flashinfer([1, 2])   # their page tables as tensors
    manager.append_kv(keys, values, packed, indptr)   # the new tokens' keys and values into those pages
    attention.plan(packed, query_lens=[100, 150])     # once a step
    out = attention.run(queries)                      # once a layer
    descriptor.release([1, 2])                        # the pages are free again

`radix.PrefixCache` stands above this: it finds the pages that a new prompt can share with earlier ones.

Importing seqattn loads neither torch nor numpy: each name below is imported from its file at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqattn.attention.front import PagedAttention
    from seqattn.attention.graphs import DecodeGraphs
    from seqattn.attention.step import DecodeStep
    from seqattn.cache import PagedKVCacheManager
    from seqattn.cost import CostModel
    from seqattn.descriptor import CacheDescriptor
    from seqattn.errors import (
        BadValueError,
        DuplicateSequenceError,
        InvariantError,
        LengthError,
        MissingExtraError,
        ModelError,
        NoPageError,
        PageError,
        PromptTooLargeError,
        SeqAttnError,
        SequenceIdError,
        SessionError,
        SharedPageError,
        TensorError,
        TokenError,
        TraceError,
        UnknownSequenceError,
    )
    from seqattn.heads import HeadIDGenerator
    from seqattn.packed import FlashInferHybridData, FlashInferPackedData, HybridLevel
    from seqattn.pages import PageAllocator
    from seqattn.sequence import SequenceData

__all__ = [
    "BadValueError",
    "CacheDescriptor",
    "CostModel",
    "DecodeGraphs",
    "DecodeStep",
    "DuplicateSequenceError",
    "FlashInferHybridData",
    "FlashInferPackedData",
    "HeadIDGenerator",
    "HybridLevel",
    "InvariantError",
    "LengthError",
    "MissingExtraError",
    "ModelError",
    "NoPageError",
    "PageAllocator",
    "PageError",
    "PagedAttention",
    "PagedKVCacheManager",
    "PromptTooLargeError",
    "SeqAttnError",
    "SequenceData",
    "SequenceIdError",
    "SessionError",
    "SharedPageError",
    "TensorError",
    "TokenError",
    "TraceError",
    "UnknownSequenceError",
]

__version__ = "0.1.0"

#: the file of every public name that is not an error
_HOME = {
    "CacheDescriptor": "seqattn.descriptor",
    "CostModel": "seqattn.cost",
    "DecodeGraphs": "seqattn.attention.graphs",
    "DecodeStep": "seqattn.attention.step",
    "FlashInferHybridData": "seqattn.packed",
    "FlashInferPackedData": "seqattn.packed",
    "HeadIDGenerator": "seqattn.heads",
    "HybridLevel": "seqattn.packed",
    "PageAllocator": "seqattn.pages",
    "PagedAttention": "seqattn.attention.front",
    "PagedKVCacheManager": "seqattn.cache",
    "SequenceData": "seqattn.sequence",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  the type of a name is in the imports above
    if name not in __all__:
        raise AttributeError(f"module 'seqattn' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "seqattn.errors")), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
