"""One step of a model: the batch as tensors, packed and planned once, and the forward.

requests         a (decodes)   b (decodes)   c (3 tokens of its prompt)
input_ids        [ a9            b4            c0 c1 c2 ]
position_ids     [ 9             4             0  1  2  ]
append_indptr    [ 0             1             2         5 ]
last_rows        [ 0             1                   4  ]      if c's prompt ends here

The tokens of a batch that is made ahead, while the step before it is on its way, are on the device alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from radix.cache import PrefixCache
from radix.integrations.transformers.attention import NAME, Step
from radix.integrations.transformers.decoding import GraphSizes, GraphStep, decoder_for
from radix.integrations.transformers.model import describe
from radix.integrations.transformers.packing import pack_rows
from seqattn.append import sent
from seqattn.attention.front import PagedAttention
from seqattn.errors import BadValueError, ModelError
from seqattn.hybrid import CostModel

if TYPE_CHECKING:
    from collections.abc import Hashable

    import numpy.typing as npt

    from radix.integrations.transformers.model import Model
    from radix.integrations.transformers.scheduler import Batch
    from seqattn.packed import FlashInferHybridData, FlashInferPackedData

__all__ = ["Packing", "Runner"]

#: "hybrid" reads shared prefixes once, where that pays; "plain" reads them for each request
Packing = Literal["hybrid", "plain"]


class Runner:
    """A model whose attention is the cache's.

    Args:
        model: a causal language model of transformers; from now on its attention is ours, until `close`.
        cache: over a `PagedKVCacheManager` of the model's shape.
        backend: of `PagedAttention`.
        packing: see `Packing`.
        cost_model: which shared runs become levels; "auto" is the attention's own on CUDA, and every run elsewhere.
        graph_sizes: how decoding is captured in CUDA graphs; see `decoding`.
        max_requests: the largest batch that decodes.

    Attributes:
        decoder: what computes steps in which everything decodes; None if they are like any other.

    Raises:
        ModelError, MissingExtraError: as `describe`.
        TensorError: the cache does not fit the model.
        BadValueError: an unknown packing, backend or cost model, or something else for a cache.
    """

    def __init__(
        self,
        model: Model,
        cache: PrefixCache,
        *,
        backend: str = "auto",
        packing: Packing = "hybrid",
        cost_model: CostModel | Literal["auto"] | None = "auto",
        graph_sizes: GraphSizes = "auto",
        max_requests: int = 64,
    ) -> None:
        _refuse_options(cache, packing, cost_model)
        self.shape = describe(model)
        manager = self.shape.check_manager(cache.manager)
        self.attention = PagedAttention(manager, self.shape.num_qo_heads, backend=backend, sm_scale=self.shape.sm_scale)
        self.model = model
        self.cache = cache
        self.packing = packing
        slots = manager.num_pages * manager.page_size
        most = min(self.shape.max_positions or slots, slots)
        self.decoder = decoder_for(model, self.attention, graph_sizes, max_requests=max_requests, max_tokens=most)
        if cost_model == "auto":
            own = self.attention.cost_model if self.decoder is None else self.attention.graph_cost_model
            cost_model = own if self.attention.backend == "flashinfer" else None
        self.cost_model = cost_model
        #: an engine that was there before has taken the model's own; this is what a model has unless told otherwise
        usual = "sdpa" if model._supports_sdpa else "eager"
        had: str = model.config._attn_implementation
        self._had = usual if had == NAME else had

    def close(self) -> None:
        """Gives the model the attention that it had before."""
        if self.model.config._attn_implementation == NAME:
            self.model.set_attn_implementation(self._had)

    def prepare(self, batch: Batch, tokens: torch.Tensor | None = None) -> Step | GraphStep:
        """The batch as tensors on the model's device, and its attention planned; one copy besides the plan's own.

        Args:
            batch: what to compute.
            tokens: the new token of each request, int64 on the device, of a batch that is made ahead; None otherwise.

        Cost: O(rows + pages).
        """
        if batch.decodes:
            return self._prepare_decoding(batch, tokens)
        if self.decoder is not None and self.packing == "hybrid" and sum(batch.num_new) <= self.decoder.most_rows:
            return self._prepare_as_rows(batch)
        return self._prepare_prompts(batch)

    def _prepare_prompts(self, batch: Batch) -> Step:
        """A step with chunks of prompts."""
        tokens, positions, rows, num_tokens = self._rows(batch)
        ids = [request.id for request in batch.requests]
        packed = self.cache.pack_for_flashinfer(ids, num_tokens=num_tokens)
        data = packed if self._is_plain(ids) else self._pack(ids, batch, num_tokens)
        self.attention.plan(data, query_lens=batch.num_new)
        indptr = torch.from_numpy(np.concatenate(([0], np.cumsum(batch.num_new))).astype(np.int32))
        return Step(self.attention, packed, indptr, tokens[None], positions[None], rows)

    def _prepare_as_rows(self, batch: Batch) -> GraphStep:
        """The same as rows that are decoded."""
        tokens, positions, rows, _ = self._rows(batch)
        ids = [request.id for request in batch.requests]
        data = pack_rows(self.cache, ids, batch.lens, batch.num_new, self.cost_model)
        return GraphStep(data, tokens, positions, batch, rows)

    def _rows(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[int] | None]:
        """Tokens, positions, last rows (None for all) of a batch on the device, and its lengths where some are cut."""
        requests = batch.requests
        num_new = np.array(batch.num_new, dtype=np.int64)
        num_done = np.array(batch.lens, dtype=np.int64)
        lens, ends = num_done + num_new, np.cumsum(num_new)
        num_rows = int(ends[-1])
        in_part = [r.num_done + n < len(r.todo) for r, n in zip(requests, batch.num_new, strict=True)]
        last = ends[~np.array(in_part)] - 1
        host = np.empty(2 * num_rows + len(last), dtype=np.int64)
        np.concatenate(_tokens(batch), out=host[:num_rows])
        host[num_rows : 2 * num_rows] = np.arange(num_rows) + np.repeat(lens - ends, num_new)
        host[2 * num_rows :] = last
        there = sent(host, self.shape.device)
        rows = there[2 * num_rows :] if len(last) < num_rows else None
        return there[:num_rows], there[num_rows : 2 * num_rows], rows, lens.tolist() if any(in_part) else None

    def _prepare_decoding(self, batch: Batch, tokens: torch.Tensor | None) -> Step | GraphStep:
        """A step in which every request has one new token, its newest."""
        num, requests = len(batch.requests), batch.requests
        ids = [request.id for request in requests]
        host = np.empty(num if tokens is not None else 2 * num, dtype=np.int64)
        host[:num] = batch.lens
        if tokens is None:
            host[num:] = [request.tokens[-1] for request in requests]
        there = sent(host, self.shape.device)
        positions, tokens = there[:num], there[num:] if tokens is None else tokens
        if self.decoder is not None:
            return GraphStep(self._pack(ids, batch, None), tokens, positions)
        packed = self.cache.pack_for_flashinfer(ids)
        self.attention.plan(packed if self._is_plain(ids) else self._pack(ids, batch, None))
        indptr = torch.arange(num + 1, dtype=torch.int32)
        return Step(self.attention, packed, indptr, tokens[None], positions[None], None)

    def _is_plain(self, ids: list[Hashable]) -> bool:
        return self.packing == "plain" or len(ids) == 1

    def _pack(
        self, ids: list[Hashable], batch: Batch, num_tokens: list[int] | None
    ) -> FlashInferPackedData | FlashInferHybridData:
        """What attention reads."""
        if self._is_plain(ids):
            return self.cache.pack_for_flashinfer(ids, num_tokens=num_tokens)
        query_lens = None if batch.decodes else batch.num_new
        return self.cache.pack_hybrid_for_flashinfer(
            ids, query_lens=query_lens, cost_model=self.cost_model, num_tokens=num_tokens
        )

    def forward(self, step: Step | GraphStep) -> torch.Tensor:
        """Logits of the step's last rows, [last rows, vocabulary]; writes the KV of all its rows.

        They may lie in memory that the next forward overwrites.

        Raises:
            ModelError: a layer did not come through the attention interface.
        """
        if self.model.config._attn_implementation != NAME:  # someone else used the model in between
            self.model.set_attn_implementation(NAME)
        if isinstance(step, GraphStep):
            assert self.decoder is not None
            if step.prompts is None:
                return self.decoder.forward(step)
            found = self.decoder.forward_prompts(step)
            if found is not None:
                return found
            step = self._prepare_prompts(step.prompts)
        options: dict[str, Any] = {}
        if step.last_rows is not None and self.shape.keeps_logits:
            options["logits_to_keep"] = step.last_rows
        with torch.inference_mode():
            output = self.model(
                input_ids=step.input_ids, position_ids=step.position_ids, use_cache=False, radix_step=step, **options
            )
        if step.num_calls != self.shape.num_layers:
            raise ModelError(self.shape.name, f"{self.shape.num_layers} layers, of which {step.num_calls} attended")
        logits: torch.Tensor = output.logits[0]
        return logits if options or step.last_rows is None else logits[step.last_rows]


def _refuse_options(cache: object, packing: object, cost_model: object) -> None:
    if not isinstance(cache, PrefixCache):
        raise BadValueError(f"cache must be a PrefixCache, not {cache!r}: PrefixCache(manager_for(model, num_pages=…))")
    if packing not in ("hybrid", "plain"):
        raise BadValueError(f"packing must be 'hybrid' or 'plain', not {packing!r}")
    if cost_model not in (None, "auto") and not isinstance(cost_model, CostModel):
        raise BadValueError(f"cost_model must be None, 'auto' or a CostModel, not {cost_model!r}")


def _tokens(batch: Batch) -> list[npt.NDArray[np.int32]]:
    """The new tokens of a batch, in its order."""
    at = batch.num_decoding
    decoded = np.array([request.tokens[-1] for request in batch.requests[:at]], dtype=np.int32)
    chunks = zip(batch.requests[at:], batch.num_new[at:], strict=True)
    return [decoded, *[r.todo[r.num_done : r.num_done + size] for r, size in chunks]]
