"""flashinfer's wrappers and the memory that their plans need.

A wrapper's `plan` writes a schedule to pinned memory of its own, copies it to the device and returns before the copy is
done: a second plan would overwrite what the first still sends. So wrappers come in sets, and a set is planned anew only
after an event behind its copies.

    plan 1   set 0   copies ──▶ event
    plan 2   set 1              copies ──▶ event
    plan 3   set 0   waits for its event of plan 1, long past
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import define, field

from seqattn.load import is_short

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.attention.calls import KernelCall
    from seqattn.cache import PagedKVCacheManager

    Int32Array = npt.NDArray[np.int32]

__all__ = ["WrapperSet"]

#: query heads for each KV head at which the decode kernel without tensor cores is no slower
_SMALL_GROUPS = (1, 2)
#: bytes that a wrapper has for its schedule, unless it is given more
_INT_WORKSPACE = 8 << 20
_LEAST_FLOAT_WORKSPACE = 32 << 20


@define(slots=True, eq=False)
class _Wrapper:
    """One of flashinfer's wrappers, and the sizes of its workspaces in bytes."""

    made: Any
    float_size: int
    int_size: int


@define(slots=True, eq=False)
class WrapperSet:
    """Wrappers that are planned together.

    Attributes:
        manager: the pages that they read.
        num_qo_heads: query heads.
        num_processors: multiprocessors of the device.
        workspaces: for each stream the memory for partial results; sets share it, kernels of one stream follow another.
    """

    manager: PagedKVCacheManager
    num_qo_heads: int
    num_processors: int
    workspaces: dict[int, torch.Tensor]
    _by_kind: dict[tuple[str, int], list[_Wrapper]] = field(factory=dict)
    _pinned: torch.Tensor | None = None
    _copied: torch.cuda.Event | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Waits until the copies of the set's last use are done; marks the end of those made inside."""
        if self._copied is not None:
            self._copied.synchronize()
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self._copied.record()

    def stage(
        self, to_send: Sequence[Int32Array], to_keep: Sequence[Int32Array]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Puts arrays in pinned memory: the first on the device too, in one copy, the others on the CPU alone."""
        arrays = [*to_send, *to_keep]
        # Each begins at a multiple of 16 bytes.
        begins = np.cumsum([0, *(-(-len(array) // 4) * 4 for array in arrays)]).tolist()
        if self._pinned is None or len(self._pinned) < begins[-1]:
            self._pinned = torch.empty(2 * begins[-1], dtype=torch.int32, pin_memory=self.manager.device.type == "cuda")
        memory = self._pinned.numpy()
        for array, begin in zip(arrays, begins, strict=False):
            memory[begin : begin + len(array)] = array
        sent = self._pinned[: begins[len(to_send)]].to(self.manager.device, non_blocking=True)
        where = [slice(begin, begin + len(array)) for array, begin in zip(arrays, begins, strict=False)]
        return [sent[part] for part in where[: len(to_send)]], [self._pinned[part] for part in where[len(to_send) :]]

    def sized(self, call: KernelCall, lane: int, nth: int) -> Any:  # noqa: ANN401  flashinfer's, untyped
        """The nth wrapper of the call's kind on a stream, with workspaces that are large enough for the call."""
        kind = "short" if self._is_short(call) else call.kernel
        found = self._by_kind.setdefault((kind, lane), [])
        float_size, int_size = self._workspace_sizes(call)
        workspace = self.workspaces.get(lane)
        if workspace is None or len(workspace) < float_size:
            workspace = torch.zeros(float_size, dtype=torch.uint8, device=self.manager.device)
            self.workspaces[lane] = workspace
        while len(found) <= nth:
            found.append(_Wrapper(self._make(kind, workspace), len(workspace), _INT_WORKSPACE))
        wrapper = found[nth]
        if wrapper.float_size < float_size or wrapper.int_size < int_size:
            wrapper.float_size, wrapper.int_size = len(workspace), max(int_size, wrapper.int_size)
            ints = torch.empty(wrapper.int_size, dtype=torch.uint8, device=self.manager.device)
            wrapper.made.reset_workspace_buffer(workspace, ints)
        return wrapper.made

    def _is_short(self, call: KernelCall) -> bool:
        tokens = len(call.kv_page_indices) * self.manager.page_size
        heads_each = self.num_qo_heads // self.manager.num_heads
        return call.kernel == "decode" and is_short(heads_each, len(call.qo_indptr) - 1, tokens)

    def _make(self, kernel: str, workspace: torch.Tensor) -> Any:  # noqa: ANN401  as above
        import flashinfer

        layout = self.manager.kv_layout
        if kernel == "short":
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout)
        if kernel == "decode":
            if self.num_qo_heads // self.manager.num_heads in _SMALL_GROUPS:
                return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout)
            # What "auto" comes to on every device before Blackwell, without looking for other packages at each plan.
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, layout, use_tensor_cores=True, backend="fa2"
            )
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, layout, backend=kernel)

    def _workspace_sizes(self, call: KernelCall) -> tuple[int, int]:
        """Bytes that a plan needs at most, for partial results and for the schedule."""
        rows = np.diff(call.qo_indptr).astype(np.int64)
        num_kv_heads = self.manager.num_heads
        if call.kernel == "fa3":  # splits nothing; its schedule has seven numbers for each tile and head
            num_tiles = int((-(-rows // 128)).sum())
            num_heads = num_kv_heads if call.by_group else self.num_qo_heads
            return _LEAST_FLOAT_WORKSPACE, 28 * num_tiles * num_heads + 4 * self.num_processors + 4096
        packed = rows * (self.num_qo_heads // num_kv_heads)
        mean = int(packed.sum()) // max(len(rows), 1)
        tile = 16 if mean <= 16 else 64 if mean <= 64 else 128
        # Lists of pages are split for at most two blocks a multiprocessor; each keeps a tile of float32 results.
        most = 2 * self.num_processors // num_kv_heads + 1
        float_size = self.num_qo_heads * most * tile * (self.manager.head_dim + 1) * 4
        num_tiles = max(int((-(-packed // tile)).sum()), most)
        return max(float_size, _LEAST_FLOAT_WORKSPACE), 16 * num_tiles + 8 * (int(rows.sum()) + len(rows)) + 4096
