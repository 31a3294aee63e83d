"""A transformers model's decode step as one CUDA graph: `DecodeGraphs` calls the model, whose layers call its step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from seqattn.attention.graphs import DecodeGraphs
from seqattn.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from radix.integrations.transformers.model import Model
    from seqattn.attention.captured import CapturedStep
    from seqattn.attention.fixed import StepForm
    from seqattn.attention.front import PagedAttention
    from seqattn.attention.step import DecodeStep

__all__ = ["ModelGraphs", "Rows", "graphs_for"]


class Rows:
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


class ModelGraphs(DecodeGraphs[torch.Tensor]):
    """`DecodeGraphs` that say why a model cannot be captured.

    A capture that fails half-way can leave torch's memory pools in its middle. What usually makes it fail, a look at a
    value, is found before: the run that warms up is not allowed to wait for the device. That holds for all threads of
    the process, so it is asked for the first capture alone.
    """

    #: of the model, for the error
    name = "the model"
    #: how many times as many steps are seen before a form that belongs to one batch is captured
    patience = 1

    def _steps_before(self, form: StepForm) -> int:
        """A form with tables ends when a sequence leaves; others come again."""
        return super()._steps_before(form) * (self.patience if any(call.tables for call in form.calls) else 1)

    def _recorded(self, *arguments: Any) -> CapturedStep:  # noqa: ANN401  those of `DecodeGraphs`
        try:
            return super()._recorded(*arguments)
        except Exception as error:  # a model is a program: it may raise anything
            reason = (str(error).splitlines() or [""])[0] or "no reason given"
            raise CaptureError(self.name, f"{type(error).__name__}: {reason}") from error

    def _run_captured(self, step: CapturedStep, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.num_captures:
            return super()._run_captured(step, inputs)
        with _without_waiting():
            return super()._run_captured(step, inputs)


@contextmanager
def _without_waiting() -> Iterator[None]:
    """What waits for the device raises RuntimeError inside."""
    mode = torch.cuda.get_sync_debug_mode()
    _set_mode("error")
    try:
        yield
    finally:
        _set_mode(mode)


def _set_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls the mode a prototype, each time that it is set
        torch.cuda.set_sync_debug_mode(mode)


def graphs_for(
    model: Model, attention: PagedAttention, batch_sizes: Sequence[int], *, max_tokens: int, capture_after: int = 2
) -> ModelGraphs:
    """Graphs of a model's decode step: `replay(data, tokens, positions)`, both int64 [rows], gives [rows, vocabulary].

    The model's forward must only launch: one that looks at values, as those of mixtures of experts may, raises
    `CaptureError` when it is captured. Arguments as of `DecodeGraphs`.
    """

    def forward(step: DecodeStep, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, radix_step=Rows(step))
        logits: torch.Tensor = output.logits[0]
        return logits

    graphs = ModelGraphs(attention, forward, batch_sizes, max_tokens=max_tokens, capture_after=capture_after)
    graphs.name = type(model).__name__
    return graphs
