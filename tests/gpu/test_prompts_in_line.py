"""Graphs that read a prompt as one array: its place in memory belongs to the graph, and another place is never read."""

from __future__ import annotations

from typing import Any

import pytest

from seqattn import DecodeGraphs
from seqattn.attention.calls import Choice, Work
from seqattn.attention.plan import BatchPlan
from tests.gpu.test_decode_graphs import PAGE_SIZE, Engine, compare
from tests.gpu.test_layer_graphs import ByLayer

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

#: two slices of 512 tokens and more
NUM_PROMPT_TOKENS = 1100
NUM_STEPS, MOVES_BEFORE = 100, 50


@pytest.mark.parametrize("by_layer", [False, True], ids=["whole step", "by layer"])
@pytest.mark.parametrize("heads", [(32, 8), (8, 8)], ids=str)
def test_a_prompt_that_moves_is_read_where_it_is(by_layer: bool, heads: tuple[int, int]) -> None:
    engine = Engine(heads, num_sequences=21, num_prompt_tokens=NUM_PROMPT_TOKENS)
    graphs: Any
    if by_layer:
        graphs = ByLayer(engine, [24], max_tokens=1400)
        forms = graphs.graphs._graphs
    else:
        graphs = forms = DecodeGraphs(engine.attention, engine.model, [24], max_tokens=1400)
    backend, spans = forms._backend, []
    plain_work = backend.work

    def work(plan: BatchPlan, _: object = None) -> Work:
        found: Work = plain_work(plan, [Choice("fa3", 2)] * (len(plan.levels) - 1) + [Choice("decode")])
        spans.append(found.calls[0].span)
        return found

    backend.work = work
    compare(engine, graphs, NUM_STEPS, hybrid=True, moves_before=MOVES_BEFORE)
    places = {spans[0], spans[-1]}
    assert None not in places
    assert len(places) == 2, "the prompt has moved"
    assert all(span is not None and span[1] == NUM_PROMPT_TOKENS // PAGE_SIZE for span in places)
    in_graphs = {form.calls[0].span for form, *_ in forms._steps}
    assert places < in_graphs, "one graph for each place"
    assert None in in_graphs, "and one that reads page by page until a place was seen often enough"
    assert forms.num_replays >= NUM_STEPS - 6
