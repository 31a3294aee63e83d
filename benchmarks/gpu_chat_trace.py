"""A recorded trace as prompts for a small cache."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["prompts_of"]


def prompts_of(
    trace: Path, vocab_size: int, num_requests: int, page_size: int
) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
    """Prompts of a trace of hashed blocks, a page of random tokens for each, and lengths of answers, a 32nd of its."""
    pages: dict[int, np.ndarray[Any, Any]] = {}
    with gzip.open(trace, "rt", encoding="utf-8") as lines:
        for _, line in zip(range(num_requests), lines, strict=False):
            record = json.loads(line)
            for block in record["hash_ids"]:
                if block not in pages:
                    pages[block] = np.random.default_rng(block).integers(3, vocab_size, page_size)
            ids = np.concatenate([pages[block] for block in record["hash_ids"]])
            yield ids[: max(1, record["input_length"] // 32)], max(1, record["output_length"] // 32)
