"""Calls on three streams: who waits for whom, also where a call fails; CUDA is stood in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqattn.attention.streams import Streams


class Fakes:
    """Notes what happens to streams and events, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, ...]] = []
        self.current = "main"
        made: Any = object.__new__(Streams)  # without what needs a device
        made._index, made._pause = 0, self
        made._sides = [Stream(self, "first"), Stream(self, "between")]
        made._events = tuple(Event(self, name) for name in ("begun", "later", "first", "between"))
        self.streams = made
        self.main = Stream(self, "main")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.main)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream.name))

    def zero_(self) -> None:
        self.log.append(("pause",))


class Stream:
    """A stream by its name."""

    def __init__(self, fakes: Fakes, name: str) -> None:
        self.fakes, self.name = fakes, name

    def wait_event(self, event: Event) -> None:
        self.fakes.log.append((self.name, "waits for", event.name))


class Event:
    """An event by its name."""

    def __init__(self, fakes: Fakes, name: str) -> None:
        self.fakes, self.name = fakes, name

    def record(self, stream: Stream) -> None:
        self.fakes.log.append((stream.name, "records", self.name))


def test_each_call_has_its_stream_and_the_caller_waits_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes, seen = Fakes(monkeypatch), []
    fakes.streams.run(4, lambda i: seen.append((i, fakes.current)), pause=True)
    assert seen == [(0, "first"), (1, "between"), (2, "between"), (3, "main")]
    assert fakes.log.index(("pause",)) < fakes.log.index(("main", "records", "later"))
    assert fakes.log[-4:] == [
        ("first", "records", "first"),
        ("main", "waits for", "first"),
        ("between", "records", "between"),
        ("main", "waits for", "between"),
    ]
    assert fakes.current == "main"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_call_that_fails_leaves_no_launches_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    fakes = Fakes(monkeypatch)

    def call(i: int) -> None:
        if i == failing:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fakes.streams.run(3, call, pause=False)
    assert fakes.current == "main"
    assert ("main", "waits for", "first") in fakes.log
    assert (("main", "waits for", "between") in fakes.log) == (failing > 0)
