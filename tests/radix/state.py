"""What a `PrefixCache` holds, as plain values: to compare with the model, and before with after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from radix.cache import PrefixCache
    from radix.node import Node
    from radix.tree import RadixTree
    from tests.radix.tables import Key


def entries(tree: RadixTree) -> dict[Key, tuple[int, int]]:
    """Every cached prefix that ends where a page ends: its page and the page's stamp."""
    found: dict[Key, tuple[int, int]] = {}
    for namespace, root in tree.roots.items():
        todo: list[tuple[Node, tuple[int, ...]]] = [(child, ()) for child in root]
        while todo:
            node, above = todo.pop()
            tokens = tuple(np.frombuffer(node.key, dtype=np.int32).tolist())
            for index, page in enumerate(node.page_ids.tolist()):
                prefix = above + tokens[: (index + 1) * tree.page_size]
                assert (namespace, prefix) not in found, f"{prefix} is in the tree twice"
                found[namespace, prefix] = (page, node.stamp)
            todo += [(child, above + tokens) for child in node]
    return found


def eviction_order(tree: RadixTree) -> list[int]:
    """Idle pages, the next one to be evicted first."""
    return [page for node in tree.idle for page in reversed(node.page_ids.tolist())]


def tables(cache: PrefixCache) -> dict[Any, list[int]]:
    """The page table of each running sequence."""
    return {seq_id: data.kv_page_indices for seq_id, data in cache.descriptor.seq_id_to_data.items()}


def snapshot(cache: PrefixCache) -> dict[str, object]:
    """Everything that a call which fails must leave as it was; how edges are split is not part of it."""
    manager, descriptor, stats = cache.manager, cache.descriptor, cache.stats
    return {
        "ref_count": manager.ref_count.tolist(),
        "free pages": manager.free_pages.tolist(),
        "outside": manager.num_outside_refs,
        "tables": tables(cache),
        "lengths": {seq_id: descriptor.num_tokens(seq_id) for seq_id in descriptor.seq_id_to_data},
        "tree": {key: page for key, (page, _) in entries(cache.tree).items()},
        "eviction order": eviction_order(cache.tree),
        "reclaimable": cache.num_reclaimable_pages,
        "stats": {name: repr(getattr(stats, name)) for name in dir(stats) if not name.startswith("_")},
    }


def newest(tree: RadixTree, pages: set[int]) -> int:
    """The one of these pages that was used last."""
    stamps = {page: stamp for page, stamp in entries(tree).values() if page in pages}
    return max(stamps, key=stamps.__getitem__)
