"""Hybrid and plain packing of one engine's steps, side by side."""

from __future__ import annotations

import torch

from radix.integrations.transformers import Engine
from radix.integrations.transformers.runner import Runner
from radix.integrations.transformers.scheduler import Batch

__all__ = ["Both"]


class Both:
    """Stands in for an engine's runner: computes each step with plain packing too, and keeps that one's logits."""

    def __init__(self, engine: Engine) -> None:
        self.shape, self.close = engine.runner.shape, engine.runner.close
        self.hybrid = engine.runner
        self.plain = Runner(engine.model, engine.cache, packing="plain")
        self.num_tokens = self.num_equal = 0
        self.apart: list[float] = []
        self.differences: list[float] = []

    def prepare(self, batch: Batch) -> Batch:
        """Nothing yet: a plan is valid until the next one of the same attention."""
        return batch

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits with plain packing, after those with hybrid packing were compared with them."""
        hybrid, plain = (self._logits(runner, batch) for runner in (self.hybrid, self.plain))
        if batch.num_decoding == len(batch.requests):
            self._compare(hybrid.float(), plain.float())
        return plain

    @staticmethod
    def _logits(runner: Runner, batch: Batch) -> torch.Tensor:
        return runner.forward(runner.prepare(batch))

    def _compare(self, hybrid: torch.Tensor, plain: torch.Tensor) -> None:
        best = plain.topk(2, dim=-1).values
        is_equal = hybrid.argmax(-1) == plain.argmax(-1)
        self.num_tokens += len(is_equal)
        self.num_equal += int(is_equal.sum())
        # A bfloat16 number has 8 bits: numbers from 2**e on are 2**(e - 7) apart.
        step = torch.exp2(best[:, 0].abs().log2().floor() - 7)
        self.apart += ((best[:, 0] - best[:, 1]) / step)[~is_equal].tolist()
        self.differences.append(float((hybrid - plain).abs().amax(-1).div(step).max()))
