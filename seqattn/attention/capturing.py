"""One capture of a CUDA graph at a time, and none that a garbage collection spoils."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["capturing"]

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def capturing() -> Iterator[None]:
    """Held during a capture.

    Beginning one waits for the device, which another thread's capture on it would not survive. Nor does a capture
    survive that an older graph is destroyed by its thread: "operation not permitted when stream is capturing"
    (pytorch/pytorch#161037). Engines and models refer to themselves, so that graphs which nobody has any more are left
    to Python's collector, and that runs at any new container. It is turned off meanwhile, for the whole process: as
    long as a model's step is run once. What a model itself collects or drops then is not held back.
    """
    with _ONE_AT_A_TIME:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()
