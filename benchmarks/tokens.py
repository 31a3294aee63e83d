"""Turning prompts into keys: the only time that the form in which a caller has token ids matters.

list, array, torch int64, numpy int64, numpy int32   conversion and check
tobytes                                              the copy of numpy int32 that becomes the key, nothing else
bytes beyond the key                                 memory that the conversion of numpy int32 needs at its worst
"""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.clock import Sample, group_size, limited, time_groups
from benchmarks.command import TakeSamples, main
from benchmarks.workload import ids

OPTIONS = {"tokens": 32_768}


def prepare(adapter: Any, *, tokens: int) -> TakeSamples:  # noqa: ANN401  impls.load
    """Writes the same prompt in every form."""
    import torch

    prompt, convert = ids(tokens, seed=1), adapter.convert
    narrow = prompt.astype(np.int32)
    forms = {
        "list": prompt.tolist(),
        "array": array("q", prompt.tobytes()),
        "torch int64": torch.from_numpy(prompt),
        "numpy int64": prompt,
        "numpy int32": narrow,
    }

    def take() -> dict[str, Sample]:
        samples = {name: _time(convert, form) for name, form in forms.items()}
        samples["tobytes"] = _time(np.ndarray.tobytes, narrow)
        samples["bytes beyond the key"] = Sample([_peak(convert, narrow) - narrow.nbytes], unit="B")
        return samples

    return take


def _time(convert: Callable[[Any], object], form: object) -> Sample:
    convert(form)
    size = group_size(convert, form)
    return Sample(time_groups(convert, ([form] * size for _ in limited(0.15))), {"calls_in_group": size})


def _peak(convert: Callable[[Any], object], form: object) -> int:
    tracemalloc.start()
    try:
        kept = convert(form)
        _, peak = tracemalloc.get_traced_memory()
        del kept
        return peak
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    main("tokens", OPTIONS)
