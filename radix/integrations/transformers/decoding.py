"""Decode steps with CUDA graphs: of the whole model, or of each layer's attention.

    graph_sizes       whole step one graph                      attention of each layer a graph
    "auto"            while the model can be captured           from when it cannot, for good
    (1, 8, 64)        for these batch sizes                     never
    ()                never                                     always
    None              never                                     never

The attention's graphs need nothing of the model: its own code runs as it is, and finds two launches in each layer where
there were up to eight. They are for models that look at values on the way, as some mixtures of experts do.

A graph of a whole step takes short prompts along: each new token is a row, as if it were a sequence that ends with it.

    a decodes, b decodes, c has 3 tokens of its prompt after 40 cached     page_size 16
    rows    a9   b4   c40  c41  c42
    pages   those of a and of b; for each row of c its 3 pages, of which the first two are a level's

So a new message is answered, and others go on meanwhile, without the launches of a step of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from attrs import define

from radix.integrations.transformers.graphs import ModelGraphs, Rows, graphs_for
from seqattn.attention.layers import LayerGraphs, LayerStep
from seqattn.counts import positive
from seqattn.errors import BadValueError, CaptureError

if TYPE_CHECKING:
    from radix.integrations.transformers.model import Model
    from radix.integrations.transformers.scheduler import Batch
    from seqattn.attention.front import PagedAttention
    from seqattn.packed import FlashInferHybridData, FlashInferPackedData

__all__ = ["Decoder", "GraphSizes", "GraphStep", "auto_sizes", "decoder_for"]

#: drawn at the top of this file
GraphSizes: TypeAlias = Sequence[int] | Literal["auto"] | None

_log = logging.getLogger("radix")
#: a larger batch keeps the device busy without graphs, and its logits would take much memory
_MOST_ROWS = 256
#: steps of a form before it is captured where nobody asked for it: a capture takes the time of some thirty steps,
_CAPTURE_AFTER = 8
#: so that a form that ends with its batch has to last
_PATIENCE = 5


@define(slots=True, frozen=True, eq=False)
class GraphStep:
    """A forward of rows that are decoded, as graphs take it; they plan it themselves.

    Attributes:
        data: the batch, packed.
        tokens: int64 [rows].
        positions: int64 [rows].
        prompts: the batch, if it computes prompts too: every new token of theirs is a row.
        last_rows: of a batch with prompts the rows whose logits are asked for, int64 on the device; None for all.
    """

    data: FlashInferPackedData | FlashInferHybridData
    tokens: torch.Tensor
    positions: torch.Tensor
    prompts: Batch | None = None
    last_rows: torch.Tensor | None = None


class _LayerCall:
    """A `LayerStep` in the shapes of transformers; see `Call.attend`."""

    __slots__ = ("_step",)

    def __init__(self, step: LayerStep) -> None:
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
        return self._step.attend_heads(query, key, value, layer=layer)


class Decoder:
    """Computes decode steps of a model.

    Args:
        model: a causal language model whose attention is the engine's.
        whole: graphs of its whole step; None to let its own code run.
        layers: graphs of each layer's attention; None where `whole` must do.

    Attributes:
        whole: None from when the model could not be captured.
        layers: as given.
    """

    def __init__(self, model: Model, whole: ModelGraphs | None, layers: LayerGraphs | None) -> None:
        self._model = model
        self.whole = whole
        self.layers = layers
        self._takes_prompts = True

    def forward(self, step: GraphStep) -> torch.Tensor:
        """Logits [requests, vocabulary], in memory that the next step may overwrite; writes the KV of the new tokens.

        Raises:
            CaptureError: the model cannot be captured, and there is nothing else to do.
            What `DecodeGraphs.replay` raises of packed data, and whatever the model raises.
        """
        if self.whole is not None:
            try:
                return self.whole.replay(step.data, step.tokens, step.positions)
            except CaptureError as error:
                self._give_up(error)
        return self._by_layer(step)

    @property
    def most_rows(self) -> int:
        """Of a step with prompts that may be computed by a graph; 0 if none may."""
        if self.whole is None or not self.whole.captures or not self._takes_prompts:
            return 0
        return self.whole.batch_sizes[-1]

    def forward_prompts(self, step: GraphStep) -> torch.Tensor | None:
        """Logits of the last rows of a step with prompts; None if there is no graph for it, or not yet.

        After a capture that failed, of which one logged line tells, there is none any more.
        """
        if self.whole is None:
            return None
        try:
            logits = self.whole.replay_if_captured(step.data, step.tokens, step.positions)
        except CaptureError as error:
            if self.layers is not None and not self.whole.num_captures:
                self._give_up(error)
            else:  # of this form: out of memory, say
                self._takes_prompts = False
                _log.warning("prompts are computed without graphs from now on: %s", error)
            return None
        return logits if logits is None or step.last_rows is None else logits[step.last_rows]

    def _give_up(self, error: CaptureError) -> None:
        """Goes on without graphs of whole steps, or raises the error."""
        if self.layers is None:
            raise error
        reason = "%s decodes without a graph of its whole step from now on: %s"
        _log.warning(reason, error.model, error.reason)
        self.whole = None

    def _by_layer(self, step: GraphStep) -> torch.Tensor:
        assert self.layers is not None
        begun = self.layers.begin(step.data)
        call = _LayerCall(begun) if isinstance(begun, LayerStep) else Rows(begun)
        with torch.inference_mode():
            output = self._model(
                input_ids=step.tokens[None], position_ids=step.positions[None], use_cache=False, radix_step=call
            )
        logits: torch.Tensor = output.logits[0]
        return logits


def auto_sizes(max_requests: int) -> list[int]:
    """Batch sizes that are captured where nobody says which: powers of two, and the largest batch; at most 256."""
    most = min(max_requests, _MOST_ROWS)
    return sorted({most, *(1 << i for i in range(most.bit_length()))})


def decoder_for(
    model: Model, attention: PagedAttention, graph_sizes: GraphSizes, *, max_requests: int, max_tokens: int
) -> Decoder | None:
    """How a model's decode steps are computed; None for like any other step.

    Args:
        model: a causal language model whose attention is the engine's.
        attention: of its layers.
        graph_sizes: batch sizes, or as drawn at the top of this file.
        max_requests: the largest batch.
        max_tokens: of a sequence at most.

    Raises:
        BadValueError: batch sizes that are none.
    """
    if graph_sizes is None:
        return None
    # Callers without type checks pass a number, or another word.
    given: object = graph_sizes
    if not isinstance(given, Sequence) or (isinstance(given, str) and given != "auto"):
        raise BadValueError(f"graph_sizes must be 'auto', batch sizes like (1, 8, 64), or None, not {given!r}")
    if graph_sizes and graph_sizes != "auto":
        sizes = [positive("graph_sizes", size) for size in graph_sizes]
        return Decoder(model, graphs_for(model, attention, sizes, max_tokens=max_tokens), None)
    if attention.backend != "flashinfer":
        return None
    sizes = auto_sizes(max_requests)
    layers = LayerGraphs(attention, sizes, max_tokens=max_tokens)
    if graph_sizes != "auto":
        return Decoder(model, None, layers)
    rows = sorted({*sizes, *auto_sizes(_MOST_ROWS)})  # of prompts, too
    whole = graphs_for(model, attention, rows, max_tokens=max_tokens, capture_after=_CAPTURE_AFTER)
    whole.patience = _PATIENCE
    return Decoder(model, whole, layers)
