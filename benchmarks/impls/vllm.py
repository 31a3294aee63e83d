"""vLLM's KV cache manager as its scheduler drives it: a request is hashed page by page, looked up, and given blocks.

Defaults of vLLM: SHA-256 over pages of 16 tokens, statistics on, no events. Its wheel says that it needs another torch;
the cache manager is plain Python and runs with this one.
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from benchmarks.impls.stand_ins import stand_in_for

if TYPE_CHECKING:
    from benchmarks.workload import Ids

__all__ = ["VLLM"]

Prompt: TypeAlias = "list[int]"
Request: TypeAlias = Any

#: absent here; a kernel, a server or a codec each
_ABSENT = """
anthropic av compressed_tensors cuda cutlass cv2 decord depyf fastapi fastsafetensors flashinfer gguf google humming
ijson jsonschema lark llguidance lmformatenforcer mcp mistral_common model_hosting_container_standards ninja numba
nvtx openai openai_harmony opentelemetry outlines_core partial_json_parser prometheus_fastapi_instrumentator pynvml
pythonjsonlogger quack ray sentencepiece setproctitle soundfile starlette tiktoken tilelang torchaudio torchcodec
torchvision tvm_ffi uvicorn uvloop watchfiles xgrammar
"""


def _import() -> tuple[Any, ...]:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    for name in ("utils", "image_utils", "audio_utils"):  # they see what is absent before a stand-in hides it
        import_module(f"transformers.{name}")
    stand_in_for(_ABSENT)
    return (
        import_module("vllm.v1.core.kv_cache_manager").KVCacheManager,
        import_module("vllm.v1.kv_cache_interface"),
        import_module("vllm.v1.request"),
        import_module("vllm.v1.core.kv_cache_utils"),
        import_module("vllm.sampling_params").SamplingParams(max_tokens=1000),
    )


_Manager, _interface, _request, _utils, _sampling = _import()
import_module("vllm.v1.core.single_type_kv_cache_manager").register_all_kvcache_specs(None)
_hash = import_module("vllm.utils.hashing").get_hash_fn_by_name("sha256")
_utils.init_none_hash(_hash)


class VLLM:
    """`KVCacheManager` with one group of full attention."""

    package = f"vllm {version('vllm')}"

    def __init__(self, num_pages: int, page_size: int) -> None:
        spec = _interface.FullAttentionSpec(block_size=page_size, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
        group = _interface.KVCacheGroupSpec(["layer"], spec)
        # vLLM keeps one block for itself.
        config = _interface.KVCacheConfig(num_blocks=num_pages + 1, kv_cache_tensors=[], kv_cache_groups=[group])
        self.manager = _Manager(
            config,
            max_model_len=1 << 20,
            scheduler_block_size=page_size,
            hash_block_size=page_size,
            enable_caching=True,
            log_stats=True,
        )
        self.page_size = page_size
        self._hasher = _utils.get_request_block_hasher(page_size, _hash)
        self._num_requests = 0
        self._taken: list[Any] = []
        self._num_free = self.num_idle_pages
        self._num_query_tokens = self._num_hit_tokens = 0

    # -- not timed ------------------------------------------------------------------------------------------------

    @staticmethod
    def prompt(ids: Ids) -> Prompt:
        """What this scheduler holds."""
        prompt: Prompt = ids.tolist()
        return prompt

    @staticmethod
    def copy(prompt: Prompt) -> Prompt:
        """The same prompt with integers of its own, as if it had just been decoded from a message."""
        return VLLM.prompt(np.array(prompt))

    def put(self, prompt: Prompt) -> None:
        """Caches a prompt and lets go of it."""
        self.manager.free(self._start(prompt))

    def put_in_chunks(self, prompt: Prompt, chunk: int) -> None:  # noqa: ARG002  pages are hashed, whatever the chunks
        """Caches a prompt; how it was cut does not show."""
        self.put(prompt)

    @staticmethod
    def matched(result: tuple[int, tuple[list[int], ...]]) -> tuple[int, int]:
        """Tokens of a match, and pages or slots handed out for them."""
        return result[0], len(result[1][0])

    @property
    def num_idle_pages(self) -> int:
        """Pages that eviction could free: cached or not, vLLM keeps them in one queue."""
        return int(self.manager.block_pool.get_num_free_blocks())

    # -- timed ----------------------------------------------------------------------------------------------------

    def _request(self, prompt: Prompt) -> Request:
        self._num_requests += 1
        return _request.Request(
            str(self._num_requests), prompt, _sampling, None, arrival_time=0.0, block_hasher=self._hasher
        )

    def _start(self, prompt: Prompt) -> Request:
        request = self._request(prompt)
        blocks, num_known, _ = self.manager.get_computed_blocks(request)
        taken = self.manager.allocate_slots(
            request, len(prompt) - num_known, num_known, blocks, full_sequence_must_fit=True
        )
        assert taken is not None, "no block is free"
        self._num_hit_tokens += num_known
        return request

    def match(self, prompt: Prompt) -> tuple[int, tuple[list[int], ...]]:
        """A new request is hashed and looked up; the block numbers are read."""
        blocks, num_known, _ = self.manager.get_computed_blocks(self._request(prompt))
        return num_known, blocks.get_block_ids()

    def turn_of(self, prompt: Ids, reply: Ids) -> tuple[Prompt, Prompt]:
        """What `turn` takes."""
        self._num_query_tokens += len(prompt)
        return self.prompt(prompt), self.prompt(reply)

    def turn(self, turn: tuple[Prompt, Prompt]) -> None:
        """A whole request: hash, look up, allocate; the reply in one piece; free."""
        prompt, reply = turn
        request = self._start(prompt)
        request.status = _request.RequestStatus.RUNNING
        request.num_computed_tokens = len(prompt)
        request.append_output_token_ids(reply)
        taken = self.manager.allocate_slots(request, len(reply))
        assert taken is not None, "no block is free"
        self.manager.free(request)

    def turn_facts(self) -> dict[str, float]:
        """What the chat has shown beside its cost; raises if a block has been lost."""
        assert self.num_idle_pages == self._num_free, "blocks lost"
        return {"hit_rate": self._num_hit_tokens / self._num_query_tokens}

    def new_request(self, ids: Ids) -> Prompt:
        """What `request` takes."""
        return self.prompt(ids)

    def request(self, prompt: Prompt) -> None:
        """A whole request without a reply."""
        self.put(prompt)

    def hold_and_release(self, prompt: Prompt) -> None:
        """What a request does with a cached conversation before and after it runs."""
        self.put(prompt)

    def evict_pages(self, num_pages: int) -> int:
        """Takes blocks from the queue, which drops them from the cache; the caller of vLLM never does this alone."""
        self._taken += self.manager.block_pool.get_new_blocks(num_pages)
        return num_pages

    def give_back(self) -> None:
        """Puts the blocks that `evict_pages` took back into the queue."""
        self.manager.block_pool.free_blocks(self._taken)
        self._taken = []

    def new_page(self, ids: Ids) -> Request:
        """What `allocate_one` takes: a request of one page, hashed."""
        return self._request(self.prompt(ids))

    def allocate_one(self, request: Request) -> None:
        """Looks a request of one page up in a full cache and gives it a block: evicts one, hands it out, caches it."""
        blocks, num_known, _ = self.manager.get_computed_blocks(request)
        self.manager.allocate_slots(request, self.page_size, num_known, blocks, full_sequence_must_fit=True)

    def new_growth(self, request: Request, ids: Ids) -> Request:
        """What `extend_one` takes: the same request with a page of output, hashed."""
        request.status = _request.RequestStatus.RUNNING
        request.num_computed_tokens = self.page_size
        request.append_output_token_ids(self.prompt(ids))
        return request

    def extend_one(self, request: Request) -> None:
        """Evicts a block and appends it to a running request."""
        taken = self.manager.allocate_slots(request, self.page_size)
        assert taken is not None, "no block is free"

    def end_one(self, request: Request) -> None:
        """Ends the request that `allocate_one` began; it stays cached."""
        self.manager.free(request)

    abort_one = end_one
