"""Time to the first token, alone and beside others: parts of `gpu_chat`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_chat import Work

__all__ = ["first", "join"]

Row = dict[str, Any]
#: messages of which the last half is measured: graphs are captured by then
NUM_MESSAGES = 32


def first(work: Work) -> Iterator[Row]:
    """Time to the first token, cold and cached."""
    sizes = work.sizes
    for num_cached in sizes.cached:
        for graphs in (None, "auto"):
            with work.engine(2 * (num_cached + 1024) // 16 + 64 + NUM_MESSAGES * 8, graph_sizes=graphs) as engine:
                engine.generate([work.tokens(num_cached)], max_new_tokens=1)  # kernels are loaded
                cold: list[float] = []
                for _ in range(3):
                    engine.cache.clear()
                    system = work.tokens(num_cached)
                    (request,) = engine.generate([system + work.tokens(sizes.message)], max_new_tokens=1)
                    cold.append(request.time_to_first_token or 0.0)
                engine.generate([system], max_new_tokens=1)
                warm = []
                for _ in range(NUM_MESSAGES):
                    (request,) = engine.generate([system + work.tokens(sizes.message)], max_new_tokens=1)
                    warm.append(request.time_to_first_token or 0.0)
                engine.cache.check()
            ms = [statistics.median(times) * 1e3 for times in (cold, warm[NUM_MESSAGES // 2 :])]
            how = {"cached": num_cached, "message": sizes.message, "graphs": graphs or "none"}
            yield how | {"cold_ms": ms[0], "cached_ms": ms[1]}


def join(work: Work) -> Iterator[Row]:
    """Messages that join a batch, one every few steps."""
    sizes = work.sizes
    for graphs in (None, "auto"):
        own = -(-(sizes.message + 8 * NUM_MESSAGES + 64) // 16)
        num_pages = sizes.system // 16 + (sizes.batch + NUM_MESSAGES) * own + 8
        with work.engine(num_pages, max_requests=sizes.batch, graph_sizes=graphs) as engine:
            system = work.tokens(sizes.system)
            engine.generate([system], max_new_tokens=1)
            options: Row = {"max_new_tokens": 8 * NUM_MESSAGES, "stop_tokens": ()}
            others = sizes.batch * 3 // 4
            requests = [engine.submit(system + work.tokens(sizes.message), **options) for _ in range(others)]
            while not all(request.tokens for request in requests):
                engine.step()
            times, pauses = [], []
            for _ in range(NUM_MESSAGES):
                request = engine.submit(system + work.tokens(sizes.message), max_new_tokens=4, stop_tokens=())
                longest = 0.0
                for _ in range(6):
                    begin = time.perf_counter()
                    engine.step()
                    longest = max(longest, time.perf_counter() - begin)
                times.append(request.time_to_first_token or 0.0)
                pauses.append(longest)
            engine.cache.check()
        ms = [statistics.median(each[NUM_MESSAGES // 2 :]) * 1e3 for each in (times, pauses)]
        how = {"cached": sizes.system, "message": sizes.message, "others": others, "graphs": graphs or "none"}
        yield how | {"joins_ms": ms[0], "pause_ms": ms[1]}
