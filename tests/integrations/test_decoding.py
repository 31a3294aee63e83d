"""Which graphs a decode step goes through, and what happens to a model that cannot be captured; without CUDA."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch

from radix.integrations.transformers import Engine
from radix.integrations.transformers.decoding import Decoder, auto_sizes
from radix.integrations.transformers.graphs import ModelGraphs, graphs_for
from seqattn.attention.captured import CapturedStep
from seqattn.attention.fixed import CallForm, StepForm
from seqattn.attention.graphs import DecodeGraphs
from seqattn.attention.layers import LayerGraphs
from seqattn.errors import BadValueError, CaptureError
from tests.integrations.models import check_all_free, engine_for, generated, prompt

PROMPTS = [prompt(i, 6 + i) for i in range(5)]


class Uncaptured(ModelGraphs):
    """Every step is captured, which fails: the model looks at a value."""

    def replay(self, *_: Any) -> torch.Tensor:  # noqa: ANN401  whatever `replay` takes
        self.num_captures += 1
        raise CaptureError("LlamaForCausalLM", "RuntimeError: called a synchronizing CUDA operation")


def engine_that_fails(*, with_layers: bool) -> tuple[Engine, Uncaptured]:
    """An engine on the CPU whose decode steps go the way of CUDA."""
    engine = engine_for("Llama")
    attention = engine.runner.attention
    whole = Uncaptured(attention, lambda *_: torch.zeros(1), [8], max_tokens=64)
    layers = LayerGraphs(attention, [8], max_tokens=64) if with_layers else None
    engine.runner.decoder = Decoder(engine.model, whole, layers)
    return engine, whole


def test_a_model_that_cannot_be_captured_goes_on_without_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    engine, whole = engine_that_fails(with_layers=True)
    with caplog.at_level(logging.WARNING, logger="radix"):
        answers = engine.generate(PROMPTS, max_new_tokens=12)
    assert [answer.tokens for answer in answers] == [generated("Llama", ids, 12) for ids in PROMPTS]
    assert whole.num_captures == 1, "it is not tried again"
    decoder = engine.runner.decoder
    assert decoder is not None
    assert decoder.whole is None
    assert decoder.layers is not None
    assert decoder.layers.num_eager > 0
    assert (decoder.layers.num_captures, decoder.layers.num_replays) == (0, 0)
    (record,) = caplog.records
    assert record.getMessage() == (
        "LlamaForCausalLM decodes without a graph of its whole step from now on: "
        "RuntimeError: called a synchronizing CUDA operation"
    )
    check_all_free(engine)


def test_where_graphs_were_asked_for_it_raises_and_nothing_is_lost() -> None:
    engine, whole = engine_that_fails(with_layers=False)
    request = engine.submit(PROMPTS[0], max_new_tokens=4)
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM cannot be captured .* serve it with graph_sizes='auto'"):
        engine.wait([request])
    engine.runner.decoder = None
    engine.wait([request])
    assert request.tokens == generated("Llama", PROMPTS[0], 4)
    assert whole.num_captures == 1
    check_all_free(engine)


@pytest.mark.parametrize("error", [RuntimeError("called a synchronizing CUDA operation\nmore"), TypeError()])
def test_whatever_a_capture_raises_is_the_reason(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(self: object, step: CapturedStep, inputs: object) -> None:
        assert modes[-1] == "error", "the model may not wait for the device"
        raise error

    def recorded(self: Any, form: object, on: object, work: object, places: object, inputs: object) -> None:  # noqa: ANN401
        self._run_captured(None, inputs)

    def set_mode(mode: object) -> None:
        warnings.warn("a prototype feature", stacklevel=2)  # as torch does; here a warning is an error
        modes.append(mode)

    modes: list[object] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(DecodeGraphs, "_run_captured", fails)
    monkeypatch.setattr(DecodeGraphs, "_recorded", recorded)
    engine = engine_for("Llama")
    graphs = graphs_for(engine.model, engine.runner.attention, [4], max_tokens=64)
    with pytest.raises(CaptureError) as caught:
        graphs._recorded(None, None, None, None, [])
    assert caught.value.__cause__ is error
    assert caught.value.model == "LlamaForCausalLM"
    assert caught.value.reason.startswith(type(error).__name__)
    assert "\n" not in caught.value.reason
    assert modes == [0, "error", 0]


def test_only_the_first_capture_forbids_to_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds for the whole process: other threads would be told so too."""
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(DecodeGraphs, "_run_captured", lambda *_: torch.zeros(1))
    engine = engine_for("Llama")
    graphs = graphs_for(engine.model, engine.runner.attention, [4], max_tokens=64)
    step: Any = None
    graphs._run_captured(step, [])
    graphs.num_captures = 1
    graphs._run_captured(step, [])
    assert modes == ["error", 0]


def test_on_the_cpu_nothing_is_captured_unless_batch_sizes_are_given() -> None:
    for graph_sizes in ("auto", (), None):
        assert engine_for(graph_sizes=graph_sizes).runner.decoder is None
    decoder = engine_for(graph_sizes=(1, 8)).runner.decoder
    assert decoder is not None
    assert decoder.whole is not None
    assert decoder.whole.batch_sizes == [1, 8]
    assert decoder.layers is None


@pytest.mark.parametrize("graph_sizes", ["all", 8, {8}, (0,), (True,), ("8",)])
def test_graph_sizes_that_are_none_are_refused(graph_sizes: object) -> None:
    with pytest.raises(BadValueError, match="graph_sizes"):
        engine_for(graph_sizes=graph_sizes)


def test_sizes_by_default_are_powers_of_two_and_the_largest_batch() -> None:
    assert auto_sizes(1) == [1]
    assert auto_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert auto_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert auto_sizes(1000) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_a_form_that_ends_with_its_batch_has_to_last_longer_before_it_is_captured() -> None:
    lasting = CallForm("decode", False, False, 8, 8, 80)
    passing = CallForm("fa2", False, False, 4, 2, 8, tables=b"tables")
    engine = engine_for("Llama")
    attention = engine.runner.attention
    layers = LayerGraphs(attention, [8], max_tokens=64)._graphs
    whole = graphs_for(engine.model, attention, [8], max_tokens=64, capture_after=3)
    steps = [StepForm(8, (lasting,), direct=True), StepForm(8, (passing, lasting), direct=False)]
    assert [layers._steps_before(form) for form in steps] == [2, 8]
    assert [whole._steps_before(form) for form in steps] == [3, 3]
    whole.patience = 5
    assert [whole._steps_before(form) for form in steps] == [3, 15]
