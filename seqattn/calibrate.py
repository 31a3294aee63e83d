"""Measuring what attention costs on a device: batches of many shapes, each computed in many ways.

Whole steps are measured, not kernels: what calls that run at the same time do to one another is what matters most. From
their times `seqattn.fit` finds the constants that predict them best.

    batch     systems prompts, each with documents, each asked by as many sequences as fill the batch
    way       which depths of its forest are levels, at most two; fa2 or fa3 in some slices for each; or plain
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from attrs import evolve

from seqattn.errors import BadValueError
from seqattn.fit import Measured, fit_device
from seqattn.forest import Run, build_forest, depths_of
from seqattn.groups import groups_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.device import Device, Groups, Heads

    Int64Array = npt.NDArray[np.int64]

__all__ = ["CalibrationBatch", "Shape", "calibrate", "calibration_shapes", "lasting", "measure"]

PAGE_SIZE = 16
#: fewer batches say too little about two dozen constants and more
_LEAST_BATCHES = 12
#: slices of a level alone, and of two levels together
_SLICES, _FEW_SLICES = (1, 2, 4, 8, 16), (1, 2, 4, 8)


class Shape(NamedTuple):
    """`systems` prompts of `system_len`, each with `documents` of `document_len`; `own_len` for each sequence."""

    batch: int
    systems: int
    system_len: int
    documents: int
    document_len: int
    own_len: int

    def __str__(self) -> str:
        """(batch, shared, own tokens) for one shared prefix, else the forest and the batch."""
        if self.documents == 1 and self.document_len == 0 and self.systems == 1:
            return f"({self.batch}, {self.system_len}, {self.own_len})"
        prompts = f"{self.systems}, {self.system_len}, {self.documents}, {self.document_len}"
        return f"({prompts}, {self.own_len}) for {self.batch}"

    @property
    def num_tokens(self) -> int:
        """Different tokens."""
        prompts = self.systems * (self.system_len + self.documents * self.document_len)
        return prompts + self.batch * self.own_len


def calibration_shapes(count: int, most_tokens: int, *, seed: int = 0) -> list[Shape]:
    """Shapes with sizes spread evenly over their orders of magnitude: two of five with one shared prefix.

    Args:
        count: how many.
        most_tokens: different tokens that a batch may have, at least 4096.
        seed: of the random numbers.
    """
    if most_tokens < 4096:
        raise BadValueError(f"{most_tokens} tokens are too few to measure with: free memory of the device")
    rng = np.random.default_rng(seed)

    def size(low: int, high: int) -> int:
        return int(np.exp(rng.uniform(np.log(low), np.log(high)))) // PAGE_SIZE * PAGE_SIZE

    shapes: list[Shape] = []
    while len(shapes) < count:
        batch = int(rng.choice([4, 8, 16, 32, 64, 128, 256, 512]))
        if len(shapes) % 5 < 2:
            shape = Shape(batch, 1, size(64, 65536), 1, 0, size(64, 4096))
        else:
            systems, documents = int(2 ** rng.integers(0, 4)), int(2 ** rng.integers(1, 6))
            shape = Shape(batch, systems, size(128, 32768), documents, size(128, 16384), size(64, 4096))
        if shape.num_tokens <= most_tokens and 2 * shape.systems * shape.documents <= batch:
            shapes.append(shape)
    return shapes


class CalibrationBatch:
    """A shape as page tables, and its forest.

    Attributes:
        shape: the shape.
        tables: each sequence's page table; pages in random places.
        in_line: but those of prompts side by side, for every other seed.
        lens: tokens of each sequence, int64 [batch].
        forest: order and runs.
        depths: of each run.
    """

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        self.shape = shape
        sizes = [shape.system_len // PAGE_SIZE, shape.document_len // PAGE_SIZE, shape.own_len // PAGE_SIZE]
        num_prompts = shape.systems * shape.documents
        pages = np.random.default_rng(seed).permutation(shape.num_tokens // PAGE_SIZE).astype(np.int32)
        ends = np.cumsum([shape.systems * sizes[0], num_prompts * sizes[1]])
        self.in_line = seed % 2 == 1
        if self.in_line:
            pages = np.concatenate((np.arange(ends[0]), ends[0] + np.argsort(pages[ends[0] :]))).astype(np.int32)
        systems, documents, own = np.split(pages, ends)
        counts = (shape.systems, num_prompts, shape.batch)
        levels = [part.reshape(n, -1) for part, n in zip((systems, documents, own), counts, strict=True)]
        which = np.arange(shape.batch) * num_prompts // shape.batch
        rows = (levels[0][which // shape.documents], levels[1][which], levels[2])
        self.tables = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        self.lens = np.array([len(table) * PAGE_SIZE for table in self.tables], dtype=np.int64)
        self.forest: tuple[list[int], list[Run]] = build_forest(self.tables, ((self.lens - 1) // PAGE_SIZE).tolist())
        self.depths = depths_of(self.forest[1])

    def levels(self, kept: Sequence[bool]) -> list[Groups]:
        """The groups of each level if these runs are kept."""
        before = np.arange(len(self.tables) + 1)
        *shared, last = groups_of(self.forest[1], kept, before, self.lens[self.forest[0]], page_size=PAGE_SIZE)
        # One group is the one prompt: there are at least two documents, or none.
        return [*(evolve(groups, in_line=self.in_line and len(groups.rows) == 1) for groups in shared), last]

    def ways(self, *, has_fa3: bool) -> Iterator[tuple[list[bool], list[int]]]:
        """For each way which runs are kept, and the slices of each level: 0 for fa2."""
        depths = sorted(set(self.depths))
        for count in range(min(2, len(depths)) + 1):
            slices = (0, *(_SLICES if count == 1 else _FEW_SLICES)) if has_fa3 else (0,)
            for chosen in combinations(depths, count):
                kept = [depth in chosen for depth in self.depths]
                yield from ((kept, list(way)) for way in product(slices, repeat=count))


#: microseconds a layer of a batch with these runs kept, in these slices
Timer = Callable[[CalibrationBatch, Sequence[bool], Sequence[int]], float]


def lasting(seconds: float, clock: Callable[[], float]) -> Callable[[], bool]:
    """An `on_batch` that stops so many seconds after the first batch, in which kernels are compiled."""
    begun: float | None = None

    def goes_on() -> bool:
        nonlocal begun
        now = clock()
        begun = now if begun is None else begun
        return now - begun < seconds

    return goes_on


def measure(
    shapes: Sequence[Shape], timer: Timer, *, has_fa3: bool, on_batch: Callable[[], bool] = lambda: True
) -> list[Measured]:
    """The time of every way to compute batches of these shapes.

    Args:
        shapes: the batches.
        timer: measures one way.
        has_fa3: whether to measure fa3 too.
        on_batch: called after each batch; False stops, as soon as there are enough.
    """
    measured: list[Measured] = []
    for number, shape in enumerate(shapes):
        batch = CalibrationBatch(shape, seed=number)
        for kept, slices in batch.ways(has_fa3=has_fa3):
            measured.append(Measured(number, batch.levels(kept), slices, timer(batch, kept, slices)))
        if not on_batch() and number + 1 >= _LEAST_BATCHES:
            break
    return measured


def calibrate(measured: Sequence[Measured], heads: Heads, begin: Device) -> Device:
    """The constants that predict what was measured.

    Args:
        measured: what `measure` found.
        heads: the model's that were measured.
        begin: the constants to begin with.

    Raises:
        BadValueError: too few batches, or a time that is not a positive number.
    """
    if (found := len({step.batch for step in measured})) < _LEAST_BATCHES:
        raise BadValueError(f"{found} batches were measured: at least {_LEAST_BATCHES} are needed")
    return fit_device(measured, heads, begin)
