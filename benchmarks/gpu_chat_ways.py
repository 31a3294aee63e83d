"""Ways to compute the same step, side by side: which tokens they choose, and how far they are from the truth.

    hybrid             shared prefixes once, by the kernels that the planner chooses; merged by log-sum-exp
    plain              each sequence by itself, flashinfer's decode kernel with tensor cores
    plain, CUDA cores  the same by its decode kernel without: another way of equal standing
    float32 attention  the model in its dtype, its attention in float32
    float32            all of the model in float32, on the same weights and the same cached keys and values: the truth

All start from the same cache: each writes the keys and values of the step's tokens anew, plain last.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from radix.integrations.transformers import Engine
from radix.integrations.transformers.attention import NAME
from radix.integrations.transformers.runner import Runner
from radix.integrations.transformers.scheduler import Batch
from seqattn import PagedAttention, PagedKVCacheManager
from seqattn.attention.wrapper_set import WrapperSet

__all__ = ["PAIRS", "Ways"]

#: the first of each is compared with the second
PAIRS = [
    ("hybrid", "plain"),
    ("plain, CUDA cores", "plain"),
    ("hybrid", "float32"),
    ("plain", "float32"),
    ("plain, CUDA cores", "float32"),
    ("float32 attention", "float32"),
    ("hybrid", "float32 attention"),
    ("plain", "float32 attention"),
    ("plain, CUDA cores", "float32 attention"),
]


class _CudaCores(WrapperSet):
    """Decodes without tensor cores, as for models with few query heads for each KV head."""

    _is_small_group = True


class _Truth:
    """The model in float32 over a float32 copy of the cache; takes the place of a step."""

    def __init__(self, engine: Engine) -> None:
        self.cache, self.shape = engine.cache, engine.shape
        self.model = copy.deepcopy(engine.model).float()
        self.model.set_attn_implementation(NAME)
        manager = engine.runner.attention.manager
        sizes = (manager.num_pages, manager.page_size, manager.num_heads, manager.head_dim)
        self.manager = PagedKVCacheManager(*sizes, torch.float32, manager.device, num_layers=manager.num_layers)
        heads = (self.manager, engine.shape.num_qo_heads)
        self.attention = PagedAttention(*heads, backend="torch", sm_scale=engine.shape.sm_scale)
        self.places: tuple[torch.Tensor, torch.Tensor] | None = None

    def logits(self, batch: Batch) -> torch.Tensor:
        """Of a step in which everything decodes, [requests, vocabulary]."""
        ids = [request.id for request in batch.requests]
        packed = self.cache.pack_for_flashinfer(ids)
        last = packed.kv_page_indices[packed.kv_page_indptr[1:] - 1]
        self.places = (last.long().to(self.shape.device), packed.kv_last_page_len.long().to(self.shape.device) - 1)
        for mine, theirs in zip(
            self.manager.get_memory_tensors(),
            self.cache.manager.get_memory_tensors(),  # type: ignore[attr-defined]
            strict=True,
        ):
            mine.copy_(theirs)
        self.attention.plan(self.cache.pack_hybrid_for_flashinfer(ids))
        given = [[request.tokens[-1] for request in batch.requests], [request.num_done for request in batch.requests]]
        tokens, positions = torch.from_numpy(np.array(given, dtype=np.int64)).to(self.shape.device)
        with torch.inference_mode():
            output = self.model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, radix_step=self)
        found: torch.Tensor = output.logits[0]
        return found

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _scaling: float | None
    ) -> torch.Tensor:
        """See `Call.attend`."""
        assert self.places is not None
        for cache, new in zip(self.manager.layer_tensors(layer), (key, value), strict=True):
            cache[self.places] = new[0].transpose(0, 1)
        return self.attention.run(query[0].transpose(0, 1), layer=layer)[None]


class _Pair:
    """What is counted of two ways."""

    def __init__(self) -> None:
        self.num_tokens = self.num_equal = 0
        self.apart: list[float] = []
        self.largest = 0.0
        self.errors: list[float] = []

    def add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Logits of the same step; gaps are those of the other's two best."""
        best = other.topk(2, dim=-1).values
        is_equal = one.argmax(-1) == other.argmax(-1)
        self.num_tokens += len(is_equal)
        self.num_equal += int(is_equal.sum())
        # A bfloat16 number has 8 bits: numbers from 2**e on are 2**(e - 7) apart.
        step = torch.exp2(best[:, 0].abs().log2().floor() - 7)
        self.apart += ((best[:, 0] - best[:, 1]) / step)[~is_equal].tolist()
        self.largest = max(self.largest, float((one - other).abs().amax(-1).div(step).max()))
        self.errors += ((one - other).norm(dim=-1) / other.norm(dim=-1)).tolist()

    def row(self) -> dict[str, float]:
        """The figures."""
        apart = sorted(self.apart)
        return {
            "tokens": self.num_tokens,
            "equal": self.num_equal,
            "different": len(apart),
            "apart_at_most_1_step": sum(a <= 1 for a in apart),
            "apart_at_most_2_steps": sum(a <= 2 for a in apart),
            "most_apart_steps": round(apart[-1], 2) if apart else 0.0,
            "largest_difference_of_a_logit_steps": round(self.largest, 2),
            "mean_relative_error": float(f"{np.mean(self.errors):.4g}") if self.errors else 0.0,
        }


class Ways:
    """Stands in for an engine's runner: computes each step in every way, and keeps plain packing's logits."""

    def __init__(self, engine: Engine) -> None:
        self.shape, self.close = engine.runner.shape, engine.runner.close
        parts = (engine.model, engine.cache)
        plain, cores = (Runner(*parts, packing="plain", graph_sizes=None) for _ in range(2))
        exact = Runner(*parts, packing="hybrid", backend="torch", graph_sizes=None)
        impl: Any = cores.attention._impl
        if cores.attention.backend == "flashinfer":
            sizes = (impl.manager, impl.num_qo_heads, impl.num_processors)
            workspaces: dict[int, torch.Tensor] = {}
            impl.sets = tuple(_CudaCores(*sizes, workspaces) for _ in range(2))
        self.plain = plain
        self.runners = {"float32 attention": exact, "hybrid": engine.runner, "plain, CUDA cores": cores, "plain": plain}
        self.truth = _Truth(engine)
        self.pairs: defaultdict[tuple[str, str], _Pair] = defaultdict(_Pair)

    def prepare(self, batch: Batch, _: object = None) -> Batch:
        """Nothing yet: a plan is valid until the next one of the same attention."""
        return batch

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits of plain packing, after all ways were compared."""
        if not batch.decodes:
            return self.plain.forward(self.plain.prepare(batch))
        found = {name: runner.forward(runner.prepare(batch)).clone() for name, runner in self.runners.items()}
        logits = {name: each.float() for name, each in found.items()} | {"float32": self.truth.logits(batch).float()}
        for one, other in PAIRS:
            self.pairs[one, other].add(logits[one], logits[other])
        return found["plain"]

    def rows(self) -> Iterator[dict[str, Any]]:
        """What was found, for each pair."""
        for one, other in PAIRS:
            yield {"way": one, "against": other} | self.pairs[one, other].row()
