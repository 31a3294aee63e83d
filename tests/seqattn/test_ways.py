"""The fastest ways to compute levels of groups that are alike: one by one, as numpy finds them among all."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from seqattn.device import Device, Groups, Heads
from seqattn.fit import Measured, predict
from seqattn.load import Cut
from seqattn.one_load import Lists
from seqattn.steps import NUMBERS, body_of, one_by_one
from seqattn.ways import Ways, best_slices

heads = st.sampled_from([Heads(), Heads(32, 32), Heads(8, 1), Heads(4, 2, 64)])


def alike(count: int, rows: int, tokens: int, *, repeated: int = 0, in_line: bool = False) -> Groups:
    """A level of so many groups; `repeated` of its tokens are read by two of them."""
    return Groups(np.full(count, rows), np.full(count, tokens), count * tokens - repeated, in_line)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Groups], Groups]:
    """One or two shared levels of groups that are alike, and a last level of sequences of one length or of many."""
    documents, each, rows = draw(st.integers(1, 6)), draw(st.integers(1, 64)), draw(st.integers(1, 3))
    batch = documents * each
    pages = st.integers(1, 900)
    top = alike(1, rows * batch, 16 * draw(pages), in_line=draw(st.booleans()))
    lower = alike(documents, rows * each, 16 * draw(pages), repeated=16 * draw(st.integers(0, documents - 1)))
    own = np.random.default_rng(draw(st.integers(0, 99))).integers(1, 2000, batch)
    if draw(st.booleans()):
        own[:] = own[0]
    last = Groups(np.full(batch, rows), own, int(own.sum()))
    return draw(st.sampled_from([[top], [lower], [top, lower]])), last


@settings(max_examples=300)
@given(steps(), heads, st.booleans(), st.booleans())
def test_they_are_the_ways_that_numpy_finds(
    step: tuple[list[Groups], Groups], heads: Heads, has_fa3: bool, has_short: bool
) -> None:
    shared, last = step
    device = evolve(Device(), has_fa3=has_fa3, has_short=has_short)
    found = best_slices(device, heads, shared, last)
    assert found is not None
    us, slices = found
    (least, _), *_ = device.ways(Cut.of([*shared, last]), [len(shared)], heads)
    assert us == pytest.approx(least)
    assert predict([Measured(0, [*shared, last], slices, 1.0)], heads, device)[0] == pytest.approx(us)
    assert device.best(shared, heads, last) == found


@given(st.integers(1, 256), st.integers(16, 20_000), st.floats(0.5, 4))
def test_a_call_behind_which_nothing_comes_is_that_call(rows: int, tokens: int, mix: float) -> None:
    _, bodies = Ways(Device(), Heads()).shared(rows, Lists(3, tokens, 3 * tokens), 3 * tokens)
    nothing = (0.0,) * 10 + (mix, 0.0, 0.0, 0.0)
    for body in bodies:
        assert one_by_one(body, nothing, 0.0) == pytest.approx(body)
        assert one_by_one(body, nothing, 2.5)[5] == pytest.approx(body[5] + 2.5), "but for what a level costs"
        assert one_by_one(body, body, 0.0)[0] == pytest.approx(2 * body[0])


def test_what_is_not_alike_is_left_to_numpy() -> None:
    device, heads, last = Device(), Heads(), alike(8, 1, 300)
    level = alike(2, 4, 512)
    assert best_slices(device, heads, [level], last) is not None
    assert best_slices(device, heads, [], last) is None
    assert best_slices(device, heads, [level] * 3, last) is None, "three levels"
    assert best_slices(device, heads, [level], alike(0, 1, 300)) is None, "no sequences"
    for other in (evolve(level, rows=np.array([3, 5])), evolve(level, tokens=np.array([512, 528]))):
        assert best_slices(device, heads, [other], last) is None
        assert best_slices(device, heads, [level, other], last) is None
        assert device.best([other], heads, last) == device.ways(Cut.of([other, last]), [1], heads)[0]
    assert best_slices(device, heads, [level], evolve(last, rows=np.array([1] * 7 + [2]))) is None, "rows that differ"


def test_rows_that_are_written_and_merged_take_time_by_their_elements() -> None:
    load = (100, 51_200, 512, 64, 32, 256, 128, 1e6, 1e5)
    for column in Device().columns:
        usual = body_of(Device(), column, 0, load, Heads(32, 8, 128), NUMBERS)
        for heads, share in ((Heads(8, 1, 128), 0.25), (Heads(32, 8, 64), 0.5), (Heads(64, 8, 128), 2.0)):
            found = body_of(Device(), column, 0, load, heads, NUMBERS)
            assert (found[1], found[5]) == (pytest.approx(share * usual[1]), pytest.approx(share * usual[5]))
            assert heads.head_dim != 128 or found[0] == usual[0], "blocks know nothing of that"
