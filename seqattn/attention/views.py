"""Keys and values of pages that follow one another, as kernels take them: views of the manager's memory, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from seqattn.cache import PagedKVCacheManager

    Pair = tuple[torch.Tensor, torch.Tensor]

__all__ = ["Spans"]

#: arrays of pages side by side that are kept for a layer
_MOST_SPANS = 64


class Spans:
    """Pages side by side as arrays; made anew if the manager gets other memory.

    Attributes:
        exist: tokens of pages that follow one another lie side by side.
    """

    def __init__(self, manager: PagedKVCacheManager) -> None:
        self._manager = manager
        self._known: dict[int, tuple[Pair, dict[tuple[int, int], Pair]]] = {}
        self.exist = manager.kv_layout == "NHD"

    def of(self, layer: int, span: tuple[int, int]) -> Pair:
        """Keys and values of pages side by side as arrays, [tokens, heads, head_dim] each.

        Args:
            layer: of the manager.
            span: the first of the pages, and how many.
        """
        pages = self._manager.layer_tensors(layer)
        of, arrays = self._known.get(layer, (None, {}))
        if of is not pages:
            arrays = {}
            self._known[layer] = pages, arrays
        found = arrays.get(span)
        if found is None:
            if len(arrays) >= _MOST_SPANS:
                arrays.clear()
            first, count = span
            keys, values = (t[first : first + count].view(-1, *t.shape[2:]) for t in pages)
            found = arrays[span] = keys, values
        return found
