"""All runs of sequences that are grouped already, from what neighbours have in common; numpy only.

In a depth-first order a run is a stretch of neighbours that agree on more pages than those around them:

    sequence     0   1   2   3   4   5
    page 0       7   7   7   2   2   6           runs [0, 3) to page 2
         1       8   8   8   1   0   ·                [1, 3) to page 4
         2       5   4   4   ·   ·   ·                [3, 5) to page 1
         3       ·   3   3   ·   ·   ·
         4       ·   ·   ·   ·   ·   ·           each its own from here on
    agree up to    2   4   0   1   0             two neighbours each

The tables, from the page where not all agree to the least limit, are one array: comparing its rows finds where each two
neighbours part. A sequence that belongs to an earlier branch goes on there with a page that was seen before: then the
order is not depth-first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seqattn.pages import PageArray

__all__ = ["grouped_runs", "stretches"]

#: from so many sequences on, and up to so many pages, this is faster than to walk branch by branch
_FEWEST, _MOST_PAGES = 12, 100_000


def grouped_runs(
    tables: Sequence[PageArray], limits: Sequence[int], depth: int, least: int
) -> list[tuple[int, int, int]] | None:
    """Of each run the first sequence, the page where it ends, and where its sequences stop; those above first.

    Args:
        tables: page tables that agree on their first `depth` pages, and not all on the next.
        limits: how many pages of each may be shared.
        depth: where they part.
        least: the least of the limits.

    Returns:
        The runs; None where the order is not depth-first, or cannot be seen to be, or where this would be slow.

    Cost: an operation on bytes for each sequence, and some 20 numpy calls.
    """
    count, width = len(tables), least + 1 - depth
    if count < _FEWEST or count * width > _MOST_PAGES:
        return None
    # One page more than all may share: neighbours that agree up to there part there.
    parts: list[Any] = [table[depth : least + 1] for table in tables]
    pages = np.frombuffer(bytearray().join(parts), dtype=np.int32)
    if len(pages) < count * width:  # a table ends at its limit
        return None
    rows = pages.reshape(count, width)
    # Page numbers are not negative, so ~i is the next page of a sequence that may share no more.
    all_short = limits.count(least) == count
    short = np.arange(count) if all_short else np.array([i for i, limit in enumerate(limits) if limit == least])
    rows[short, -1] = ~short
    common = (rows[:-1] != rows[1:]).argmax(axis=1)
    runs = stretches((common + depth).tolist(), depth)
    # The page that each branch goes on with; rows that agree in all columns seem to part at their first.
    seen = rows[1:][np.arange(count - 1), common].tolist()
    seen += [rows.item(first, end - depth) for first, end, _ in runs]
    seen.append(rows.item(0))
    return runs if len(set(seen)) == len(seen) else None


def stretches(ends: list[int], depth: int) -> list[tuple[int, int, int]]:
    """The runs, from where each sequence parts from the one before it."""
    runs: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int]] = [(0, depth)]
    top = depth  # where the last one opened ends
    for i, end in enumerate([*ends, depth]):
        if end == top:
            continue
        first = i
        while top > end:
            first, _ = opened.pop()
            runs.append((first, top, i + 1))
            top = opened[-1][1]
        if top < end:
            opened.append((first, end))
            top = end
    return sorted(runs)
