"""What one decode step of the engine costs the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from radix.integrations.transformers import Engine
from radix.integrations.transformers.attention import NAME

__all__ = ["host_rows"]


class _NoAttention:
    """Takes the place of a step: attention that computes nothing and writes nothing."""

    @staticmethod
    def attend(
        _layer: int, query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor, _scaling: float | None
    ) -> torch.Tensor:
        """The queries themselves, in the output's shape."""
        return query.transpose(1, 2)


class _Timer:
    """Microseconds of the calls of one function, each begun with the device idle."""

    def __init__(self, call: Callable[..., Any], device: torch.device) -> None:
        self.call = call
        self.device = device
        self.times: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  whatever the function takes
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        result = self.call(*args, **kwargs)
        self.times.append((time.perf_counter() - begin) * 1e6)
        return result

    @property
    def us(self) -> float:
        """The median, the first ten left out where there are more."""
        return round(statistics.median(self.times[10:] or self.times), 1)


def host_rows(engine: Engine, num_steps: int) -> dict[str, float]:
    """Times the parts of decode steps of everything that runs; all of it must be decoding.

    Returns:
        Microseconds: `schedule` (admission, extending), `prepare` (tensors, packing, planning), `forward` until the
        model's call returns, `publish_and_accept`, `forward_without_attention`. `host` is all that the CPU does in a
        step and `added` what that is more than the last, with their shares of it: where decoding is a CUDA graph, the
        forward itself is gone. `step` is a whole step by the clock, the device's time included.
    """
    device = engine.shape.device
    steps = []
    for _ in range(num_steps):
        begin = time.perf_counter()
        engine.step()
        steps.append((time.perf_counter() - begin) * 1e6)
    owners: list[tuple[Any, str]] = [
        (engine.scheduler, "next_batch"),
        (engine.runner, "prepare"),
        (engine.runner, "forward"),
        (engine.scheduler, "done"),
        (engine, "_accept"),
    ]
    timers = {name: _Timer(getattr(owner, name), device) for owner, name in owners}
    restore = [_replace(owner, name, timers[name]) for owner, name in owners]
    for _ in range(num_steps):
        engine.step()
    for undo in restore:
        undo()
    parts = {name: timer.us for name, timer in timers.items()}
    bare = _forward_without_attention(engine, num_steps)
    host = sum(parts.values())
    return {
        "step_us": round(statistics.median(steps), 1),
        "schedule_us": parts["next_batch"],
        "prepare_us": parts["prepare"],
        "forward_us": parts["forward"],
        "publish_and_accept_us": round(parts["done"] + parts["_accept"], 1),
        "forward_without_attention_us": bare,
        "host_us": round(host, 1),
        "host_share": round(host / bare, 3),
        "added_us": round(host - bare, 1),
        "added_share": round(host / bare - 1, 3),
    }


def _replace(owner: Any, name: str, timer: _Timer) -> Callable[[], None]:  # noqa: ANN401  engine, runner or scheduler
    """Puts a timer in the place of a method; returns what undoes it."""
    original, kind = timer.call, type(owner)
    if not hasattr(owner, "__dict__"):  # slots: the class is changed instead
        plain = getattr(kind, name)
        setattr(kind, name, lambda _, *args, **kwargs: timer(*args, **kwargs))
        return lambda: setattr(kind, name, plain)
    setattr(owner, name, timer)
    return lambda: setattr(owner, name, original)


def _forward_without_attention(engine: Engine, num_steps: int) -> float:
    model, rows = engine.model, engine.num_running
    ids = torch.full((1, rows), 5, device=engine.shape.device)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=ids, use_cache=False, radix_step=_NoAttention)

    timer = _Timer(forward, engine.shape.device)
    for _ in range(num_steps):
        timer()
    return timer.us
