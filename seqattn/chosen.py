"""What a device has chosen, for later batches that come to the same.

Shared runs of such a batch are the same, with nearly as many sequences each, as when one has joined or left. Long lists
(`seqattn.long_lists`), which are runs of one sequence, come and go: of each depth all are kept or none, and what counts
is about how many there are, and how long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from seqattn.forest import Run, depths_of, without

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy as np
    import numpy.typing as npt

    from seqattn.alike import AlikeRuns

    Int64Array = npt.NDArray[np.int64]

__all__ = ["Chosen", "what_matters"]

#: a choice is the same for so many steps of decoding
_STEPS_ALIKE = 32
#: leading bits of a number of sequences that are told apart: of a run an eighth, of the batch and of tokens a sixteenth
_BITS_OF_RUN, _BITS = 4, 5


class Chosen(NamedTuple):
    """A choice of runs, apart from how many of one sequence there are.

    Attributes:
        shared: of each run of several sequences whether it is kept.
        alone: depths at which runs of one sequence are kept.
    """

    shared: list[bool]
    alone: frozenset[int]

    @classmethod
    def from_kept(cls, runs: Sequence[Run], kept: Sequence[bool]) -> Chosen:
        """The choice that keeps these runs of a forest, of each depth all of one sequence or none."""
        shared = [keep for run, keep in zip(runs, kept, strict=True) if run.stop - run.first > 1]
        if len(shared) == len(runs):
            return cls(shared, frozenset())
        found = zip(runs, depths_of(runs), kept, strict=True)
        return cls(shared, frozenset(depth for run, depth, keep in found if keep and run.stop - run.first == 1))

    def kept(self, runs: Sequence[Run]) -> list[bool]:
        """For each run of a forest with the same shared runs whether it is kept."""
        if len(self.shared) == len(runs):
            return list(self.shared)
        its, depths = iter(self.shared), depths_of(runs)
        return [
            next(its) if run.stop - run.first > 1 else depth in self.alone
            for run, depth in zip(runs, depths, strict=True)
        ]


def what_matters(
    runs: Sequence[Run], alike: AlikeRuns | None, rows_before: Int64Array, num_tokens: Int64Array, page_size: int
) -> tuple[Hashable, ...]:
    """The same for batches that come to the same choice: what differs between them is worth a few percent at most.

    Args:
        runs: the forest.
        alike: the same, if its runs are alike.
        rows_before: query rows before each position of the order, int64 [batch + 1].
        num_tokens: tokens of the sequence at each position, int64 [batch].
        page_size: tokens in a page.
    """
    batch, shared = len(num_tokens), 0
    its: list[Hashable] = []
    if alike is not None:
        shared = batch * sum(alike.pages)
        its += *alike.counts, *(_rough(size, _BITS_OF_RUN) for size in alike.sizes), *alike.pages
    else:
        several = [stop - first > 1 for first, stop, *_ in runs]
        if not all(several):
            shared, numbers = _alone(runs, several)
            its += numbers
            runs, _ = without(runs, several)
        for first, stop, begin, end, parent in runs:
            shared += (stop - first) * (end - begin)
            its += _rough(stop - first, _BITS_OF_RUN), begin, end, parent
    num_rows = rows_before.item(-1)
    most_rows = 1 if num_rows == batch else int((rows_before[1:] - rows_before[:-1]).max())
    rows = _rough(batch, _BITS), _rough(num_rows, _BITS), _rough(most_rows, _BITS_OF_RUN)
    # Of its own a sequence has a few tokens more at every step. Lengths that are the same in the mean may differ: one
    # sequence that is much longer than the others counts.
    own = (int(num_tokens.sum()) - page_size * shared) // (_STEPS_ALIKE * batch)
    return tuple(its), rows, _rough(own, _BITS), _rough(int(num_tokens.max()) // _STEPS_ALIKE, _BITS)


def _alone(runs: Sequence[Run], several: list[bool]) -> tuple[int, list[Hashable]]:
    """Pages of the runs of one sequence, and of each depth that has some about how many there are, with what pages."""
    found: dict[int, list[int]] = {}
    for run, depth, is_shared in zip(runs, depths_of(runs), several, strict=True):
        if not is_shared:
            found.setdefault(depth, []).append(run.end - run.begin)
    about = [
        (depth, _rough(len(its), _BITS_OF_RUN), _rough(sum(its), _BITS_OF_RUN), _rough(max(its), _BITS_OF_RUN))
        for depth, its in sorted(found.items())
    ]
    return sum(map(sum, found.values())), [*about]


def _rough(number: int, num_bits: int) -> int:
    """The number with all but its leading bits cleared."""
    shift = max(number.bit_length() - num_bits, 0)
    return number >> shift << shift
