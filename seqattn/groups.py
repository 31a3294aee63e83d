"""What the levels of a batch compute and read, from the forest alone: before anything is packed.

A run that is dropped goes down to the kept runs below it, and is listed once for each of them:

    run 0 [0, 4)  pages 0 1                dropped
      run 1 [0, 2)  page 2                 kept: group 0, pages 0 1 2
      run 2 [2, 4)  page 3                 kept: group 1, pages 0 1 3      6 pages, 4 of them different
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from seqattn.device import Groups
from seqattn.forest import Run, without

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    Int64Array = npt.NDArray[np.int64]

__all__ = ["groups_of"]


def groups_of(
    runs: Sequence[Run], kept: Sequence[bool], rows_before: Int64Array, num_tokens: Int64Array, *, page_size: int
) -> list[Groups]:
    """The groups of each level if these runs are kept, coarsest first, the last level's included.

    Args:
        runs: the forest, each run behind the one above it.
        kept: for each run whether it is a group of a level.
        rows_before: query rows before each position of the order, int64 [batch + 1].
        num_tokens: tokens of the sequence at each position of the order, int64 [batch].
        page_size: tokens in a page.

    Cost: O(runs * depth), a few numpy calls for each run and level.
    """
    left, nearest = without(runs, kept)
    end = np.zeros(len(num_tokens), dtype=np.int64)
    level_of: list[int] = []
    for run in left:
        level_of.append(0 if run.parent is None else level_of[run.parent] + 1)
        end[run.first : run.stop] = run.end
    num_levels = 1 + max(level_of, default=-1)
    #: for each level the pages that it lists once more
    again = [0] * (num_levels + 1)
    for level, count in _listed_again(runs, kept, [level_of[n] if n is not None else -1 for n in nearest]):
        again[level] += count
    for run, keep in zip(runs, kept, strict=True):
        if not keep:
            alone = int(np.count_nonzero(end[run.first : run.stop] <= run.begin))
            again[-1] += max(alone - 1, 0) * (run.end - run.begin)
    groups = []
    for level in range(num_levels):
        members = [run for run, its in zip(left, level_of, strict=True) if its == level]
        bounds = np.array([(run.first, run.stop, run.begin, run.end) for run in members], dtype=np.int64).T
        tokens = (bounds[3] - bounds[2]) * page_size
        different = int(tokens.sum()) - again[level] * page_size
        groups.append(Groups(rows_before[bounds[1]] - rows_before[bounds[0]], tokens, different))
    own = num_tokens - end * page_size
    return [*groups, Groups(np.diff(rows_before), own, int(own.sum()) - again[-1] * page_size)]


def _listed_again(runs: Sequence[Run], kept: Sequence[bool], levels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """For each level and dropped run above its groups, the level and the pages that it lists once more."""
    lists: Counter[tuple[int, int]] = Counter()
    for i, run in enumerate(runs):
        above = run.parent if kept[i] else None
        while above is not None and not kept[above]:
            lists[levels[i], above] += 1
            above = runs[above].parent
    for (level, i), count in lists.items():
        yield level, (count - 1) * (runs[i].end - runs[i].begin)
