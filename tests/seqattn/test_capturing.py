"""While a CUDA graph is captured no garbage is collected, and no other thread captures."""

from __future__ import annotations

import ast
import gc
import threading
from collections.abc import Iterator

import pytest

from seqattn.attention.capturing import capturing
from tests.sources import ROOT


class Collections:
    """How often Python has begun to collect garbage by itself."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        self.count += phase == "start"

    def during_work(self) -> int:
        before = self.count
        assert len([[i] for i in range(5000)]) == 5000
        return self.count - before


@pytest.fixture(autouse=True)
def collections() -> Iterator[Collections]:
    """Python collects after every few new containers."""
    threshold, was_enabled, found = gc.get_threshold(), gc.isenabled(), Collections()
    gc.enable()
    gc.set_threshold(10, 10, 10)
    gc.callbacks.append(found)
    yield found
    gc.callbacks.remove(found)
    gc.set_threshold(*threshold)
    if not was_enabled:
        gc.disable()


def test_garbage_is_collected_before_and_after_but_not_while_a_graph_is_captured(collections: Collections) -> None:
    assert collections.during_work() > 0, "else this shows nothing"
    with capturing():
        assert collections.during_work() == 0
    assert collections.during_work() > 0


def test_a_capture_that_fails_leaves_the_collector_as_it_was() -> None:
    with pytest.raises(RuntimeError, match="captured"), capturing():
        raise RuntimeError("captured nothing")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with capturing():
        pass
    assert not gc.isenabled()


def test_a_capture_within_a_capture_ends_with_the_outer_one() -> None:
    with capturing():
        with capturing():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_threads_capture_one_after_the_other(collections: Collections) -> None:
    inside, most, lock = 0, 0, threading.Lock()
    begin = threading.Barrier(8)

    def capture() -> None:
        nonlocal inside, most
        begin.wait()
        for _ in range(50):
            with capturing():
                with lock:
                    inside += 1
                    most = max(most, inside)
                collections.during_work()
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=capture) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert gc.isenabled()


def calls_in(node: ast.AST) -> set[str]:
    return {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}


def test_every_capture_of_the_package_is_one_of_these() -> None:
    """A function that begins one does so inside `capturing`."""
    found = []
    for path in sorted([*ROOT.glob("seqattn/**/*.py"), *ROOT.glob("radix/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and calls_in(node) & {"torch.cuda.graph", "graph.capture_begin"}:
                held = [each for each in ast.walk(node) if isinstance(each, ast.With)]
                held = [each for each in held if any("capturing" in calls_in(item) for item in each.items)]
                found.append((path.name, bool(held)))
    assert found == [("captured.py", True), ("layers.py", True), ("cuda_steps.py", True)]
