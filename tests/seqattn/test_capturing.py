"""While a CUDA graph is captured no garbage is collected, and no other thread captures."""

from __future__ import annotations

import ast
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from seqattn.attention.capturing import capturing
from tests.sources import ROOT


class Cycle:
    """Garbage as soon as nobody holds it, which only a collection finds."""

    def __init__(self) -> None:
        self.myself = self


@pytest.fixture(autouse=True)
def _eager_collector() -> Iterator[None]:
    """Python collects at nearly every new container."""
    threshold, was_enabled = gc.get_threshold(), gc.isenabled()
    gc.enable()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*threshold)
    if not was_enabled:
        gc.disable()


def containers() -> int:
    return len([[i] for i in range(5000)])


def test_garbage_is_collected_before_and_after_but_not_while_a_graph_is_captured() -> None:
    before = weakref.ref(Cycle())
    containers()
    assert before() is None, "else this shows nothing"
    with capturing():
        garbage = weakref.ref(Cycle())
        containers()
        assert garbage() is not None
    containers()
    assert garbage() is None


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


def test_threads_capture_one_after_the_other() -> None:
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
                containers()
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
