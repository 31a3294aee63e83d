"""Decoding a transformers model with CUDA graphs: `DecodeGraphs` calls the model, whose layers call a `DecodeStep`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define

from seqattn.attention.graphs import DecodeGraphs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from radix.integrations.transformers.model import Model
    from seqattn.attention.front import PagedAttention
    from seqattn.attention.step import DecodeStep
    from seqattn.packed import FlashInferHybridData, FlashInferPackedData

__all__ = ["GraphStep", "graphs_for"]


@define(slots=True, frozen=True, eq=False)
class GraphStep:
    """A forward in which everything decodes, as graphs take it; they plan it themselves.

    Attributes:
        data: the batch, packed.
        tokens: int64 [requests].
        positions: int64 [requests].
    """

    data: FlashInferPackedData | FlashInferHybridData
    tokens: torch.Tensor
    positions: torch.Tensor


class _Rows:
    """A decode step in the shapes of transformers; see `Call.attend`."""

    def __init__(self, step: DecodeStep) -> None:
        self._step = step

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,  # noqa: ARG002  the attention has it
    ) -> torch.Tensor:
        """Writes the new rows' keys and values, then attends over the pages."""
        self._step.append_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), layer=layer)
        return self._step.run(query[0].transpose(0, 1), layer=layer)[None]


def graphs_for(
    model: Model, attention: PagedAttention, batch_sizes: Sequence[int], *, max_tokens: int
) -> DecodeGraphs[torch.Tensor]:
    """Graphs of a model's decode step: `replay(data, tokens, positions)`, both int64 [rows], gives [rows, vocabulary].

    The model's forward must only launch: one that looks at values, as those of mixtures of experts may, raises when it
    is captured.
    """

    def forward(step: DecodeStep, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, radix_step=_Rows(step))
        logits: torch.Tensor = output.logits[0]
        return logits

    return DecodeGraphs(attention, forward, batch_sizes, max_tokens=max_tokens)
