"""Keeping a prefix in the cache for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np

from radix.running import Pin, PrefixMatch, match_of

if TYPE_CHECKING:
    from types import TracebackType

    from radix.cache import PrefixCache

__all__ = ["Pinned"]


class Pinned:
    """What `PrefixCache.pin` returns: holds what matches when the block is entered, until it is left."""

    def __init__(self, cache: PrefixCache, key: bytes, namespace: Hashable) -> None:
        self._cache = cache
        self._key = key
        self._namespace = namespace
        self._pins: list[Pin] = []

    def __enter__(self) -> PrefixMatch:
        """Matches and takes a reference to each page, the partly matched last one included."""
        cache = self._cache
        with cache.lock:
            tree, manager = cache.tree, cache.manager
            path = tree.match(self._key, self._namespace)
            if cache.whole_pages:
                path.num_bytes -= path.num_bytes % tree.page_bytes
            count = -(-path.num_bytes // tree.page_bytes)
            pin = Pin(None, np.frombuffer(path.pages, dtype=np.int32, count=count))
            if count:
                pin.node = tree.cut(path.nodes[-1], path.num_pages, count)
                tree.hold(pin.node)
                manager.hold(pin.pages)
                cache.state.pins[pin] = None
            self._pins.append(pin)
            return match_of(path, tree.page_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the references back; a use of what was pinned."""
        cache = self._cache
        with cache.lock:
            pin = self._pins.pop() if self._pins else None
            if pin is not None and pin.node is not None:
                del cache.state.pins[pin]
                cache.manager.drop(pin.pages)
                cache.tree.release(pin.node)
