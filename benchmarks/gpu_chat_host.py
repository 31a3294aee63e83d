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


def host_rows(engine: Engine, num_steps: int) -> dict[str, float]:
    """Times the parts of decode steps of everything that runs; all of it must be decoding.

    The speed of a machine's CPU may change from one second to the next. So steps and bare forwards take turns, and a
    share is the median of those of neighbours.

    Returns:
        Microseconds, medians: `schedule` (admission, extending), `prepare` (tensors, packing, planning), `forward`
        until the model's call returns, `sample` (launching the choice of tokens and their copy), `publish_and_accept`,
        `forward_without_attention`. `host` is all that the CPU does in a step and `added` what that is more than the
        last, with their shares of it: where decoding is one CUDA graph, the forward itself is gone. `added_share_low`
        and `added_share_high` are the quartiles of the latter. `step` is a whole step by the clock, the device's time
        included, steps launched ahead.
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
        (engine.steps, "_chosen"),
        (engine.steps, "_land"),
        (engine, "_accept"),
    ]
    engine.steps.run_ahead = False  # each step is all that is done in its time
    engine.step()
    timers = {name: _Timer(getattr(owner, name), device) for owner, name in owners}
    bare = _Timer(_forward_without_attention(engine), device)
    for _ in range(num_steps):
        restore = [_replace(owner, name, timers[name]) for owner, name in owners]
        engine.step()
        for undo in restore:
            undo()
        bare()
    return {"step_us": round(statistics.median(steps), 1)} | _rows(timers, bare)


def _rows(timers: dict[str, _Timer], bare: _Timer) -> dict[str, float]:
    """The figures, the first rounds left out where there are enough."""
    skip = 4 if len(bare.times) > 12 else 0
    parts = {name: timer.times[skip:] for name, timer in timers.items()}
    without = bare.times[skip:]
    hosts = [sum(times) for times in zip(*parts.values(), strict=True)]
    shares = sorted(host / base for host, base in zip(hosts, without, strict=True))
    low, share, high = (shares[len(shares) * i // 4] for i in (1, 2, 3))
    us = {name: round(statistics.median(times), 1) for name, times in parts.items()}
    return {
        "schedule_us": us["next_batch"],
        "prepare_us": us["prepare"],
        "forward_us": us["forward"],
        "sample_us": us["_chosen"],
        "publish_and_accept_us": round(us["_land"] + us["_accept"], 1),
        "forward_without_attention_us": round(statistics.median(without), 1),
        "host_us": round(statistics.median(hosts), 1),
        "host_share": round(share, 3),
        "added_us": round(statistics.median(h - b for h, b in zip(hosts, without, strict=True)), 1),
        "added_share": round(share - 1, 3),
        "added_share_low": round(low - 1, 3),
        "added_share_high": round(high - 1, 3),
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


def _forward_without_attention(engine: Engine) -> Callable[[], None]:
    model, rows = engine.model, engine.num_running
    ids = torch.full((1, rows), 5, device=engine.shape.device)

    def forward() -> None:
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        with torch.inference_mode():
            model(input_ids=ids, position_ids=ids, use_cache=False, radix_step=_NoAttention)

    return forward
