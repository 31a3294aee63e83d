"""Sending what nobody will come back for to the front of the queue of idle nodes.

    [system][question] ──▶ [answer 1][question 2]        demote(all of it, after=system + question): the answer that was
                       └─▶ [answer 2]                    taken back goes first; what others continue stays where it is

The queue's order is that of its nodes' stamps (T6), and stamps never increase going down (T4). So the nodes get a stamp
below that of the queue's front, and go before it, deepest first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radix.node import Node
    from radix.tree import Path, RadixTree

__all__ = ["demote"]


def demote(tree: RadixTree, path: Path, num_kept: int) -> int:
    """Moves what only this path has after its first `num_kept` pages to the front; returns how many pages.

    What is kept of the path counts as used, unless nothing moves: then nothing changes.

    Args:
        tree: what to change.
        path: what a lookup found. If it ends inside an edge, all of it is somebody's who has more: nothing moves.
        num_kept: pages from the root that stay where they are.
    """
    chain = _own(path, num_kept)
    if not chain:
        return 0
    num_pages = sum([node.num_pages for node in chain])
    kept = tree.cut(chain[0], path.num_pages, max(num_kept, path.num_pages - num_pages))
    num_pages = min(num_pages, path.num_pages - num_kept)
    stamp = next(iter(tree.idle)).stamp - 1
    for node in reversed(chain):
        node.stamp = stamp
        tree.idle.move_to_end(node, last=False)
    if kept.parent is not None:
        tree.stamp(kept)
    return num_pages


def _own(path: Path, num_kept: int) -> list[Node]:
    """The nodes that lie past the first `num_kept` pages, one perhaps in part, and that nobody holds or continues.

    Deepest first.
    """
    chain: list[Node] = []
    end, below = path.num_pages, None
    if sum([len(node.key) for node in path.nodes]) != path.num_bytes:
        return chain
    for node in reversed(path.nodes):
        if end <= num_kept or node.num_holders or node.children is not below:
            break
        chain.append(node)
        end -= node.num_pages
        below = node
    return chain
