"""What a model calls in each layer of a decode step, in a CUDA graph or without."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seqattn.append import check_rows, write_places
from seqattn.errors import LengthError, TensorError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from seqattn.attention.plan import BatchPlan
    from seqattn.cache import PagedKVCacheManager
    from seqattn.kernels import Launcher

    Int32Array = npt.NDArray[np.int32]

__all__ = ["DecodeStep", "check_input", "first_rows", "launcher_for", "new_places"]


class DecodeStep:
    """What a model computes one decode step with: it writes each layer's new keys and values, and attends.

    Attributes:
        num_rows: sequences of the step, padding included.
    """

    def __init__(
        self,
        manager: PagedKVCacheManager,
        places: torch.Tensor,
        attend: Callable[[torch.Tensor, int], torch.Tensor],
        launcher: Launcher | None,
    ) -> None:
        self.num_rows = places.shape[1]
        self._manager = manager
        self._places = places
        self._attend = attend
        self._launcher = launcher

    def append_kv(self, keys: torch.Tensor, values: torch.Tensor, *, layer: int = 0) -> None:
        """Writes the new token of each sequence, its last; rows of padding are not written.

        Args:
            keys: [num_rows, num_heads, head_dim] of the cache's dtype, on its device.
            values: likewise.
            layer: the layer to write.

        Raises:
            TensorError: a wrong dtype, shape or device.
            LengthError: `layer` is out of range, or not `num_rows` rows.
        """
        for name, rows in (("keys", keys), ("values", values)):
            check_rows(name, rows, self._manager.key_cache, self._manager.num_heads)
            if len(rows) != self.num_rows:
                raise LengthError(f"{len(rows)} {name} for {self.num_rows} sequences (padding included)")
        caches = self._manager.layer_tensors(layer)
        write_places((keys, values), self._places, caches, self._manager.kv_layout, self._launcher)

    def run(self, q: torch.Tensor, *, layer: int = 0) -> torch.Tensor:
        """Attention of each sequence's new token over all its tokens.

        Args:
            q: [num_rows, num_qo_heads, head_dim] of the cache's dtype, on its device.
            layer: the layer of the cache to read.

        Returns:
            The output, like `q`; rows of padding hold anything.

        Raises:
            TensorError: `q` has a wrong shape, dtype or device.
            LengthError: `layer` is out of range.
        """
        return self._attend(q, layer)


def launcher_for(manager: PagedKVCacheManager) -> Launcher | None:
    """Of the kernels that write the manager's memory; None where torch does that."""
    if manager.device.type != "cuda" or find_spec("triton") is None:
        return None
    from seqattn.kernels import Launcher

    return Launcher()


def check_input(given: object, num_rows: int, device: torch.device) -> None:
    """Refuses what has not a row for each sequence, and what is elsewhere: some steps would copy it, others fail."""
    if not isinstance(given, torch.Tensor) or given.ndim == 0 or len(given) != num_rows:
        seen = f"shape {list(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
        raise TensorError(f"each input must be a tensor of {num_rows} rows, one a sequence, not {seen}")
    if given.device != device:
        raise TensorError(f"an input is on {given.device} but the cache on {device}: move it there first")


def first_rows(outputs: Any, num_rows: int) -> Any:  # noqa: ANN401  the model's
    """The rows of the sequences that there are."""
    if isinstance(outputs, torch.Tensor):
        return outputs[:num_rows]
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(first_rows(output, num_rows) for output in outputs)
    raise TensorError(f"the model must return a tensor or a tuple of tensors, not {type(outputs).__name__}")


def new_places(plan: BatchPlan) -> Int32Array:
    """Page and slot of each sequence's last token in a decoding step, int32 [2, rows], in the caller's order."""
    level = plan.levels[-1]
    places = np.empty((2, plan.num_rows), dtype=np.int32)
    rows = slice(None) if plan.rows is None else plan.rows
    places[0, rows] = level.kv_page_indices[level.kv_page_indptr[1:] - 1]
    places[1, rows] = level.kv_last_page_len - 1
    return places
