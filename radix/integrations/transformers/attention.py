"""Attention of a transformers model over paged KV: the function that its attention interface calls in every layer.

    Engine ──forward(input_ids [1, rows], radix_step=step)──▶ every layer ──▶ attend(module, q, k, v, …, radix_step)
                                                                              step.attend: append, then attention

All requests of a step are one row of tokens; `Step` knows whose they are. No mask is made: the library makes none for
an attention function without a mask function of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from attrs import define

from seqattn.errors import ModelError, SeqAttnError

if TYPE_CHECKING:
    import torch

    from seqattn.attention.front import PagedAttention
    from seqattn.packed import FlashInferPackedData

__all__ = ["NAME", "Call", "Step", "attend", "register"]

#: what the function is called in the library's table
NAME = "radix_paged"

#: keywords that change what attention computes, and what they ask for
_REFUSED = {
    "sliding_window": "a sliding window: tokens that leave it could not be shared",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias (ALiBi or relative positions)",
    "head_mask": "a head mask",
}


class Call(Protocol):
    """What a forward gives to every layer."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Attention of the new rows.

        Args:
            layer: the layer's index.
            query: [1, query heads, rows, head_dim].
            key: [1, KV heads, rows, head_dim], of the new rows only.
            value: likewise.
            scaling: factor of the scores; None for 1 / sqrt(head_dim).

        Returns:
            [1, rows, query heads, head_dim].
        """


@define(slots=True, eq=False)
class Step:
    """One forward of the running batch: everything that it needs on the device hangs here.

    Attributes:
        attention: planned for this batch.
        packed: the page tables, plain, with lengths that include the new tokens.
        append_indptr: where each request's rows begin, int32 [requests + 1], on the CPU.
        input_ids: the new tokens of all requests, int64 [1, rows].
        position_ids: their positions, int64 [1, rows].
        last_rows: the rows whose logits are wanted, int64; None for all rows.
        num_calls: layers that have been through `attend`.
    """

    attention: PagedAttention
    packed: FlashInferPackedData
    append_indptr: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last_rows: torch.Tensor | None
    num_calls: int = 0

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,  # noqa: ARG002  the attention has it: `describe` saw it
    ) -> torch.Tensor:
        """Writes the new rows' keys and values, then attends over the pages; see `Call.attend`."""
        self.num_calls += 1
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        self.attention.manager.append_kv(keys, values, self.packed, self.append_indptr, layer=layer)
        return self.attention.run(query[0].transpose(0, 1), layer=layer)[None]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    radix_step: Call | None = None,
    **others: Any,  # noqa: ANN401  the library's, different for every model
) -> tuple[torch.Tensor, None]:
    """The registered function; see `Call.attend` for shapes.

    Raises:
        SeqAttnError: the model was called by someone else than its engine.
        ModelError: the layer asks for attention of another kind.
    """
    if radix_step is None:
        raise SeqAttnError(
            "this model is served by an Engine, which passes `radix_step`: call engine.close() before using the model "
            "by itself (the engine takes it back with its next step)"
        )
    for name in _REFUSED.keys() & others.keys():
        if others[name] is not None:
            raise ModelError(type(module).__name__, _REFUSED[name])
    if attention_mask is not None:
        raise ModelError(type(module).__name__, "a mask of its own")
    is_causal = others.get("is_causal")
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        raise ModelError(type(module).__name__, "attention that is not causal")
    layer: Any = getattr(module, "layer_idx", None)
    if layer is None:
        raise ModelError(type(module).__name__, "layers without a number")
    return radix_step.attend(layer, query, key, value, scaling), None


def register() -> None:
    """Enters the function in the library's table; again and again is once."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
