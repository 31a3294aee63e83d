"""Time on the GPU: a CUDA graph of a step's layers, replayed between two events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from seqattn.cuda_steps import replay_times

__all__ = ["between_events", "copy_rate", "device_us", "host_us", "matrix_rate"]

WARM_UPS, REPEATS = 3, 30


def device_us(layers: Callable[[], object], num_layers: int, warm_ups: int = WARM_UPS) -> tuple[float, float]:
    """Microseconds a layer of what `layers` launches, as median and spread (the middle half of 30 replays).

    Args:
        layers: launches kernels of so many layers.
        num_layers: how many.
        warm_ups: replays before those 30.
    """
    times = [us / num_layers for us in replay_times(layers, warm_ups + REPEATS)]
    quarter, median, three = statistics.quantiles(times[warm_ups:], n=4)
    return round(median, 2), round(three - quarter, 2)


def between_events(launch: Callable[[], object], repeats: int = WARM_UPS + REPEATS) -> list[float]:
    """Microseconds of the device for what `launch` puts on the current stream, each time; the CPU is 1 ms ahead."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return times


def host_us(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Microseconds of the CPU until `call` returns, the device idle before each; the median."""
    times = []
    for _ in range(WARM_UPS + repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return round(statistics.median(times[WARM_UPS:]), 1)


def copy_rate() -> float:
    """Bytes a second of a kernel that copies 4 GiB within the device, those read and those written."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 8 * len(source) / device_us(lambda: torch.neg(source, out=target), 1)[0] * 1e6


def matrix_rate() -> float:
    """Operations a second of a bfloat16 matrix product of 8192 by 8192 random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / device_us(lambda: a @ b, 1)[0] * 1e6
