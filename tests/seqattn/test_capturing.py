"""While a CUDA graph is captured no garbage is collected, and no other thread captures."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from seqattn.attention.capturing import capturing


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


def test_two_threads_capture_one_after_the_other() -> None:
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
