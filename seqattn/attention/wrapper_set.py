"""flashinfer's wrappers and the memory that their plans need.

A wrapper's `plan` writes a schedule to pinned memory of its own, copies it to the device and returns before the copy is
done: a second plan would overwrite what the first still sends. So wrappers come in sets, and a set is planned anew only
after an event behind its copies.

    plan 1   set 0   copies ──▶ event
    plan 2   set 1              copies ──▶ event
    plan 3   set 0   waits for its event of plan 1, long past

While a batch decodes, its shared levels stay what they are: a wrapper that is asked for the call it is planned for is
left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import finalize

import numpy as np
import torch
from attrs import define, field

from seqattn.attention.places import laid_out
from seqattn.attention.wrapper import Wrapper
from seqattn.load import MOST_SHORT, Heads, is_short

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.attention.calls import KernelCall
    from seqattn.cache import PagedKVCacheManager

    Int32Array = npt.NDArray[np.int32]

__all__ = ["WrapperSet", "wait_for"]

#: query heads for each KV head at which the decode kernel without tensor cores is no slower
_SMALL_GROUPS = (1, 2)
#: bytes that a wrapper has for its schedule, unless it is given more
_INT_WORKSPACE = 8 << 20
_LEAST_INT_WORKSPACE = 256 << 10
_LEAST_FLOAT_WORKSPACE = 32 << 20
#: what a wrapper calls its arrays, and what a call does
_BUFFERS = {"kv_indptr": "kv_page_indptr", "kv_indices": "kv_page_indices", "kv_last_page_len": "kv_last_page_len"}
_IN_LINE = "fa3 in line"
#: where a wrapper writes a schedule before it is copied
_PINNED = "_pin_memory_int_workspace_buffer"


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
    _by_kind: dict[tuple[str, int, bool], list[Wrapper]] = field(factory=dict)
    _pinned: torch.Tensor | None = None
    _memory: Int32Array | None = None  # of `_pinned`
    _copied: torch.cuda.Event | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Waits until the copies of the set's last use are done; marks the end of those made inside."""
        if self._copied is None:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # torch does not know of the copies that wrappers make, and gives their pinned memory to others at once.
            finalize(self, wait_for, self._copied)
        else:
            self._copied.synchronize()
        try:
            yield
        finally:
            self._copied.record(torch.cuda.current_stream(self.manager.device.index))

    def stage(
        self, to_send: Sequence[Int32Array], to_keep: Sequence[Int32Array], lists: Collection[int] = ()
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Puts arrays in pinned memory: the first on the device too, in one copy, the others on the CPU alone.

        Args:
            to_send: int32.
            to_keep: likewise.
            lists: which of those to send are page numbers (`laid_out`).
        """
        arrays = [*to_send, *to_keep]
        begins = laid_out([len(array) for array in arrays], lists)
        if self._pinned is None or len(self._pinned) < begins[-1]:
            self._pinned = torch.empty(2 * begins[-1], dtype=torch.int32, pin_memory=self.manager.device.type == "cuda")
            self._memory = self._pinned.numpy()
        memory = self._memory
        assert memory is not None
        for array, begin in zip(arrays, begins, strict=False):
            memory[begin : begin + len(array)] = array
        end = begins[len(to_send) - 1] + len(to_send[-1]) if to_send else 0
        sent = self._pinned[:end].to(self.manager.device, non_blocking=True)
        where = [slice(begin, begin + len(array)) for array, begin in zip(arrays, begins, strict=False)]
        return [sent[part] for part in where[: len(to_send)]], [self._pinned[part] for part in where[len(to_send) :]]

    def sized(self, call: KernelCall, lane: int, nth: int) -> Wrapper:
        """The nth wrapper of the call's kind on a stream, with workspaces that are large enough for the call."""
        kind = "short" if self._is_short(call) else call.kind[0]
        found = self._by_kind.setdefault((kind, lane, call.by_group), [])
        float_size, int_size = self._workspace_sizes(call)
        workspace = self.workspace(lane, float_size)
        while len(found) <= nth:
            found.append(Wrapper(self._make(kind, workspace), len(workspace), _INT_WORKSPACE))
        wrapper = found[nth]
        if wrapper.float_size < float_size or wrapper.int_size < int_size:
            wrapper.begin()
            wrapper.replans = None
            wrapper.float_size, wrapper.int_size = len(workspace), max(int_size, wrapper.int_size)
            self._give(wrapper.made, workspace, wrapper.int_size)
        return wrapper

    def fixed(self, call: KernelCall, lane: int, buffers: dict[str, torch.Tensor]) -> Wrapper:
        """A new wrapper whose plans go to the same memory, so that a CUDA graph may be replayed after each.

        Args:
            call: the largest that it is planned for, with as many rows and groups as all others.
            lane: the stream.
            buffers: int32 on the device, by the name of the call's array.
        """
        float_size, int_size = self._workspace_sizes(call, fixed=True)
        workspace = self.workspace(lane, float_size)
        made = self._make(call.kind[0], workspace, buffers)
        self._give(made, workspace, max(int_size, _LEAST_INT_WORKSPACE))
        # In a graph there may be more blocks than a plan has work for; of those that decode, only where a plan could
        # not be promised one row each. Before 0.7, where it splits nothing, no mask keeps them from taking what lies
        # behind it for work: zeros are the first block's, computed once more.
        pinned = getattr(made, _PINNED, None)
        if pinned is not None:
            pinned.zero_()
        return Wrapper(made, len(workspace), int_size)

    def single(self, call: KernelCall, lane: int) -> Wrapper:
        """A new wrapper for one plan."""
        float_size, int_size = self._workspace_sizes(call)
        workspace = self.workspace(lane, float_size)
        made = self._make(call.kind[0], workspace)
        self._give(made, workspace, max(int_size, _LEAST_INT_WORKSPACE))
        return Wrapper(made, len(workspace), int_size)

    def options(self, call: KernelCall) -> dict[str, Any]:
        """Options of the plan of a fixed wrapper that decodes.

        In a graph the kernel always splits lists of pages, and merges, unless it is told not to. Where sequences alone
        fill the device it would not split them outside of a graph.
        """
        most = 2 * self.num_processors // self.manager.num_heads
        fills = len(call.kv_last_page_len) >= most and not self._is_small_group
        return {"disable_split_kv": True} if fills else {}

    def _is_short(self, call: KernelCall) -> bool:
        num_lists, page_size = len(call.kv_last_page_len), self.manager.page_size
        slots = len(call.kv_page_indices) * page_size
        # Mostly lists are much longer, as is seen at once.
        if call.kernel != "decode" or not 0 < slots <= num_lists * (MOST_SHORT + page_size):
            return False
        heads = Heads(self.num_qo_heads, self.manager.num_heads, self.manager.head_dim)
        lens = call.lens(page_size)
        return is_short(heads, self.num_processors, num_lists, int(lens.max()), int(lens.sum()))

    @property
    def _is_small_group(self) -> bool:
        return self.num_qo_heads // self.manager.num_heads in _SMALL_GROUPS

    def workspace(self, lane: int, size: int) -> torch.Tensor:
        """The memory of a stream for partial results, of at least that many bytes.

        One that is too small is replaced, and stays with the wrappers that have it.
        """
        found = self.workspaces.get(lane)
        if found is None or len(found) < size:
            with torch.inference_mode(mode=False):
                found = self.workspaces[lane] = torch.zeros(size, dtype=torch.uint8, device=self.manager.device)
        return found

    @torch.inference_mode(mode=False)  # what is made inside of it no plan outside could write to
    def _give(self, made: Any, workspace: torch.Tensor, int_size: int) -> None:  # noqa: ANN401  flashinfer's, untyped
        ints = torch.empty(int_size, dtype=torch.uint8, device=self.manager.device)
        made.reset_workspace_buffer(workspace, ints)

    @torch.inference_mode(mode=False)
    def _make(self, kernel: str, workspace: torch.Tensor, buffers: dict[str, torch.Tensor] | None = None) -> Any:  # noqa: ANN401  as above
        import flashinfer

        layout = self.manager.kv_layout
        fixed: dict[str, Any] = {}
        if buffers is not None:
            suffix = "buffer" if kernel == "decode" else "buf"
            fixed = {f"paged_{name}_{suffix}": buffers[array] for name, array in _BUFFERS.items()}
            fixed |= {"use_cuda_graph": True} | ({} if kernel == "decode" else {"qo_indptr_buf": buffers["qo_indptr"]})
        if kernel == _IN_LINE:
            if buffers is not None:
                own = {"qo_indptr_buf": buffers["qo_indptr"], "kv_indptr_buf": buffers["kv_page_indptr"]}
                fixed = {"use_cuda_graph": True} | own
            return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, layout, backend="fa3", **fixed)
        if kernel not in ("decode", "short"):
            return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, layout, backend=kernel, **fixed)
        if kernel == "short" or self._is_small_group:
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout, **fixed)
        # What "auto" comes to on every device before Blackwell, without looking for other packages at each plan.
        fixed |= {"use_tensor_cores": True, "backend": "fa2"}
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout, **fixed)

    def _workspace_sizes(self, call: KernelCall, *, fixed: bool = False) -> tuple[int, int]:
        """Bytes that a plan needs at most, for partial results and for the schedule."""
        num_rows, num_groups = int(call.qo_indptr[-1]), len(call.kv_last_page_len)
        num_kv_heads = self.manager.num_heads
        if call.kernel == "fa3":  # splits nothing; its schedule has seven numbers for each tile and head
            num_tiles = num_rows // 128 + num_groups
            num_heads = num_kv_heads if call.by_group else self.num_qo_heads
            return _LEAST_FLOAT_WORKSPACE, 28 * num_tiles * num_heads + 4 * self.num_processors + 4096
        packed = num_rows * (self.num_qo_heads // num_kv_heads)
        mean = packed // max(num_groups, 1)
        # In fixed memory the prefill kernel takes the largest tile that any batch of so many rows could need.
        is_large = fixed and call.kernel == "fa2"
        tile = 128 if is_large or mean > 64 else 64 if mean > 16 else 16
        # Lists of pages are split for at most two blocks a multiprocessor; each keeps a tile of float32 results.
        most = 2 * self.num_processors // num_kv_heads + 1
        num_tiles = max(packed // tile + num_groups, most)  # in a graph the first plan has room for uneven rows
        if fixed and call.kernel == "decode" and self.options(call):
            return _LEAST_FLOAT_WORKSPACE, 16 * num_tiles + 8 * (num_rows + num_groups) + 4096
        float_size = self.num_qo_heads * (num_tiles if fixed else most) * tile * (self.manager.head_dim + 1) * 4
        return max(float_size, _LEAST_FLOAT_WORKSPACE), 16 * num_tiles + 8 * (num_rows + num_groups) + 4096


def wait_for(event: torch.cuda.Event) -> None:
    """Waits until an event has come; not inside a capture, which may not wait and begins when all is done."""
    if not torch.cuda.is_current_stream_capturing():
        event.synchronize()
