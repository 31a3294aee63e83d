"""SGLang's prefix caches as its scheduler drives them: the Rust core, which is its default, and the classic Python one.

Token ids are `array('q')`, slots are int64 tensors, and the scheduler asks for the slots of a match separately.
"""

from __future__ import annotations

import logging
import os
import warnings
from array import array
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from benchmarks.clock import now
from benchmarks.impls.sglang_slots import Slots
from benchmarks.impls.stand_ins import stand_in_for

if TYPE_CHECKING:
    from benchmarks.workload import Ids

__all__ = ["SGLangClassic", "SGLangRust"]

Prompt: TypeAlias = "array[int]"

#: absent here; a kernel, a server or a codec each
_ABSENT = """
anthropic av cloudpickle cuda cutlass decord deep_gemm deepseek_recipe dill flashinfer grpc humming interegular
jsonschema llguidance mistral_common modelscope multipart nvshmem openai openai_harmony outlines partial_json_parser
pynvml python_multipart quack sgl_kernel smg_grpc_servicer soundfile tilelang torch_memory_saver torchaudio torchcodec
torchvision tvm_ffi uvloop watchfiles xgrammar
"""
#: present, not used by its cache, and in need of what is absent
_NOT_USED = """
sglang.srt.configs sglang.srt.constrained sglang.srt.distributed.device_communicators.custom_all_reduce
sglang.srt.entrypoints sglang.srt.multimodal sglang.srt.parser sglang.srt.utils.cuda_vmm_utils
"""


def _import() -> tuple[Any, ...]:
    os.environ.setdefault("SGLANG_RUST_BUILD_MODE", "never")
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    import_module("transformers.image_utils")  # sees that torchvision is absent before a stand-in hides it
    stand_in_for(_ABSENT, instead_of=_NOT_USED)
    folder = "sglang.srt.mem_cache"
    return (
        import_module(f"{folder}.radix_cache"),
        import_module(f"{folder}.unified_radix_cache"),
        import_module(f"{folder}.unified_cache.component_type"),
        import_module(f"{folder}.cache_init_params"),
        import_module(f"{folder}.base_prefix_cache"),
    )


_classic, _unified, _components, _params, _base = _import()


class SGLangRust:
    """`UnifiedRadixCache` over the Rust core."""

    package = f"sglang {version('sglang')}"

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.slots = Slots(num_pages, page_size)
        self.page_size = page_size
        self.cache = self._make(
            disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=self.slots, page_size=page_size
        )

    def _make(self, **options: Any) -> Any:  # noqa: ANN401  SGLang's classes
        parts = (_components.ComponentType.FULL,)
        cache = _unified.UnifiedRadixCache(
            _params.CacheInitParams(tree_components=parts, tree_core_backend="rust", **options)
        )
        assert "Rust" in type(cache.tree_core).__name__, type(cache.tree_core)
        return cache

    # -- not timed ------------------------------------------------------------------------------------------------

    @staticmethod
    def prompt(ids: Ids) -> Prompt:
        """What this scheduler holds."""
        return array("q", ids.tobytes())

    @staticmethod
    def copy(prompt: Prompt) -> Prompt:
        """The same prompt, freshly written."""
        return array("q", prompt)

    def put(self, prompt: Prompt) -> None:
        """Caches a prompt that the tree does not have, on slots of its own that nobody frees into a pool."""
        self._insert(prompt, self._slots_for(len(prompt)), 0)

    def put_in_chunks(self, prompt: Prompt, chunk: int) -> None:
        """Caches a prompt as chunked prefill does."""
        slots = self._slots_for(len(prompt))
        for end in range(chunk, len(prompt) + chunk, chunk):
            self._insert(prompt[:end], slots[:end], end - chunk)

    def _slots_for(self, num_tokens: int) -> torch.Tensor:
        return torch.arange(self.page_size, self.page_size + num_tokens, dtype=torch.int64)

    @staticmethod
    def matched(result: tuple[int, torch.Tensor]) -> tuple[int, int]:
        """Tokens of a match, and pages or slots handed out for them."""
        return result[0], len(result[1])

    @property
    def num_idle_pages(self) -> int:
        """Pages that eviction could free."""
        return int(self.cache.evictable_size()) // self.page_size

    # -- timed ----------------------------------------------------------------------------------------------------

    def match(self, prompt: Prompt) -> tuple[int, torch.Tensor]:
        """Looks a prompt up and collects the slots."""
        found = self._match(prompt)
        return found.device_prefix_len, self.cache.path_device_indices(found.last_device_node)

    def _match(self, prompt: Prompt) -> Any:  # noqa: ANN401  SGLang's result
        return self.cache.match_prefix(_base.MatchPrefixParams(key=_classic.RadixKey(prompt)))

    def new_entry(self, ids: Ids, first_page: int) -> tuple[Prompt, torch.Tensor]:
        """What `insert` takes: tokens, and the slots that hold them."""
        begin = (first_page + 1) * self.page_size
        return self.prompt(ids), torch.arange(begin, begin + len(ids), dtype=torch.int64)

    def insert(self, entry: tuple[Prompt, torch.Tensor]) -> None:
        """Puts a prompt in the tree."""
        self._insert(*entry, 0)

    def _insert(self, prompt: Prompt, slots: torch.Tensor, num_known: int) -> None:
        whole = len(slots) // self.page_size * self.page_size
        self.cache.insert(
            _base.InsertParams(
                key=_classic.RadixKey(prompt).page_aligned(self.page_size),
                value=slots[:whole],
                prev_prefix_len=num_known,
            )
        )

    def new_request(self, ids: Ids) -> tuple[Prompt, Prompt]:
        """What `request` takes."""
        return self.prompt(ids[:-1]), self.prompt(ids)

    def request(self, request: tuple[Prompt, Prompt]) -> None:
        """A whole request without a reply."""
        self.turn(request)

    def give_back(self) -> None:
        """Evicted slots are free already."""

    def hold_and_release(self, prompt: Prompt) -> None:
        """What a request does with a cached conversation before and after it runs."""
        node = self._match(prompt).last_device_node
        lock = self.cache.lock(node)
        self.cache.path_device_indices(node)
        self.cache.unlock(lock)

    def evict_pages(self, num_pages: int) -> int:
        """Frees pages, at least so many; returns how many."""
        tokens = num_pages * self.page_size
        return int(self.cache.evict(_base.EvictParams(num_tokens=tokens)).num_tokens_evicted) // self.page_size

    def turn_of(self, prompt: Ids, reply: Ids) -> tuple[Prompt, Prompt]:
        """What `turn` takes: the prompt less the token that must be computed, and the prompt with its reply."""
        return self.prompt(prompt[:-1]), self.prompt(np.concatenate((prompt, reply)))

    def turn(self, turn: tuple[Prompt, Prompt]) -> None:
        """A whole request: match, lock, collect, evict, allocate; insert; give the partial page back, unlock."""
        prompt, full = turn
        found = self._match(prompt)
        num_known, node = found.device_prefix_len, found.last_device_node
        lock = self.cache.lock(node)
        known = self.cache.path_device_indices(node)
        needed = -(-(len(full) - num_known) // self.page_size) * self.page_size
        if self.slots.available_size() < needed:
            self.cache.evict(_base.EvictParams(num_tokens=needed - self.slots.available_size()))
        begin = self.slots.clock()
        slots = torch.cat([known, self.slots.alloc_tokens(len(full) - num_known)])
        self.slots.ns += self.slots.clock() - begin
        self._insert(full, slots, num_known)
        whole = len(full) // self.page_size * self.page_size
        if whole < len(full):
            self.slots.free(slots[whole:])
        self.cache.unlock(lock)
        self.slots.count(len(prompt) + 1, num_known)

    def time_slots(self) -> None:
        """From now on `slots_ns` tells the time that handing out slots and taking them back has cost."""
        self.slots.clock = now

    @property
    def slots_ns(self) -> int:
        """Nanoseconds; 0 before `time_slots`."""
        return self.slots.ns

    def turn_facts(self) -> dict[str, float]:
        """What the chat has shown beside its cost; raises if a slot has been lost."""
        slots = self.slots
        assert slots.available_size() + self.cache.evictable_size() == slots.num_pages * self.page_size, "slots lost"
        return {"hit_rate": slots.num_hit_tokens / slots.num_query_tokens}


class SGLangClassic(SGLangRust):
    """`RadixCache` in Python."""

    def _make(self, **options: Any) -> Any:  # noqa: ANN401  SGLang's classes
        return _classic.RadixCache(_params.CacheInitParams(**options))

    def _insert(self, prompt: Prompt, slots: torch.Tensor, num_known: int) -> None:
        done = self.cache.insert(_base.InsertParams(key=_classic.RadixKey(prompt), value=slots))
        if done.prefix_len > num_known:  # its caller frees what the tree had already
            self.slots.free_segment(slots[num_known : done.prefix_len], start_pos=num_known)
