"""Keys and values of a layer as kernels take them: views of the manager's memory, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from seqattn.cache import PagedKVCacheManager

    Pair = tuple[torch.Tensor, torch.Tensor]

__all__ = ["LayerViews"]

#: arrays of pages side by side that are kept for a layer
_MOST_SPANS = 64


class LayerViews:
    """Views of a manager's memory, made anew if the manager gets another.

    Attributes:
        has_spans: tokens of pages that follow one another lie side by side.
    """

    def __init__(self, manager: PagedKVCacheManager) -> None:
        self._manager = manager
        self._caches: list[Pair] = []
        self._caches_of: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self._spans: list[dict[tuple[int, int], Pair]] = []
        self.has_spans = manager.kv_layout == "NHD"

    def pages(self, layer: int) -> Pair:
        """Keys and values of a layer, in the manager's layout. Raises LengthError: there is no such layer."""
        manager = self._manager
        if self._caches_of[0] is not manager.key_cache or self._caches_of[1] is not manager.value_cache:
            self._caches = [manager.layer_tensors(i) for i in range(manager.num_layers)]
            self._caches_of = manager.get_memory_tensors()
            self._spans = [{} for _ in self._caches]
        if type(layer) is not int or not 0 <= layer < len(self._caches):
            return manager.layer_tensors(layer)  # which says what is wrong
        return self._caches[layer]

    def span(self, layer: int, span: tuple[int, int]) -> Pair:
        """Keys and values of pages side by side as arrays, [tokens, heads, head_dim] each.

        Args:
            layer: for which `pages` has been asked.
            span: the first of the pages, and how many.
        """
        known = self._spans[layer]
        found = known.get(span)
        if found is None:
            if len(known) >= _MOST_SPANS:
                known.clear()
            first, count = span
            keys, values = (t[first : first + count].view(-1, *t.shape[2:]) for t in self._caches[layer])
            found = known[span] = keys, values
        return found
