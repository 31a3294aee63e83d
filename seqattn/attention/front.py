"""`PagedAttention`: plan once a step, run once a layer, whatever the data and the backend.

What goes where:

    packed data ──plan──▶ BatchPlan (groups of rows and pages, CPU) ──prepare──▶ what the backend keeps of it
    q           ──run───▶ rows into group order ──▶ backend ──▶ rows back into the caller's order ──▶ out, lse
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import torch
from attrs import evolve

from seqattn.attention.plan import Planner
from seqattn.cache import PagedKVCacheManager
from seqattn.cost import CostModel
from seqattn.counts import positive
from seqattn.device import Device
from seqattn.errors import BadValueError, SeqAttnError, TensorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seqattn.attention.plan import BatchPlan
    from seqattn.packed import FlashInferHybridData, FlashInferPackedData

__all__ = ["PagedAttention"]

#: name → the class, imported at first use
_BACKENDS = {
    "flashinfer": "seqattn.attention.flashinfer_backend:FlashInferBackend",
    "torch": "seqattn.attention.torch_backend:TorchBackend",
}

_QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Backend(Protocol):
    """What computes attention; its constructor takes the four arguments of `TorchBackend`."""

    #: whether `run` takes and returns rows in the caller's order; otherwise they are in group order
    orders_rows: bool
    #: what its kernels cost; None if nobody knows
    costs: Device | None

    def prepare(self, plan: BatchPlan) -> Any:  # noqa: ANN401  each backend's own
        """What `run` needs of a plan; must not change what the plan before prepared."""

    def run(
        self,
        q: torch.Tensor,
        layer: int,
        prepared: Any,  # noqa: ANN401  as above
        *,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and float32 base-2 log-sum-exp; what the latter is does not matter where it is not wanted."""


class PagedAttention:
    """Attention of query rows over the pages of their sequences, for plain and for hybrid packed data.

        attention = PagedAttention(manager, num_qo_heads=32)
        attention.plan(packed)                            # once a step
        out = attention.run(q, layer=0)                   # once a layer

    Query head h reads KV head `h // (num_qo_heads // manager.num_heads)`. The memory stays the manager's: nothing is
    written, no reference is taken, and the pages must stay in use until the last `run`. It belongs to one thread and,
    on CUDA, to one stream at a time: its workspaces and its plan are used by every `run`.

    Args:
        manager: the pages and their memory.
        num_qo_heads: query heads, a multiple of the manager's `num_heads`.
        backend: "flashinfer" runs its kernels on a float16 or bfloat16 cache on CUDA, for queries of the same dtype.
            "torch" runs on any device and computes in float32 (float64 for float64 queries). "auto" is the former where
            it is installed and reads the cache, else the latter.
        sm_scale: factor of the scores; 1 / sqrt(head_dim) by default.
        logits_soft_cap: scores become `cap * tanh(score / cap)`; None for no cap.

    Raises:
        TensorError: `manager` has no KV memory, or memory that the backend does not read.
        BadValueError: a number of heads that does not fit, an unknown backend, or a scale or cap that is not a positive
            number.
        MissingExtraError: the backend's package is not installed.
    """

    def __init__(
        self,
        manager: PagedKVCacheManager,
        num_qo_heads: int,
        *,
        backend: str = "auto",
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
    ) -> None:
        # Callers without type checks pass the allocator of a simulation.
        given: object = manager
        if not isinstance(given, PagedKVCacheManager):
            raise TensorError(f"attention needs the KV memory of a PagedKVCacheManager, not {type(given).__name__}")
        self.manager = manager
        self.num_qo_heads = positive("num_qo_heads", num_qo_heads)
        if self.num_qo_heads % manager.num_heads:
            raise BadValueError(f"num_qo_heads {num_qo_heads} is no multiple of the cache's {manager.num_heads} heads")
        scale = 1 / math.sqrt(manager.head_dim) if sm_scale is None else _positive("sm_scale", sm_scale)
        cap = None if logits_soft_cap is None else _positive("logits_soft_cap", logits_soft_cap)
        self.backend = _best_backend(manager) if backend == "auto" else backend
        self._impl: Backend = _backend_class(self.backend)(manager, self.num_qo_heads, scale, cap)
        self._planner = Planner(manager)
        self._shape: tuple[int, ...] | None = None  # of the planned queries
        self._prepared: Any = None
        self._rows: torch.Tensor | None = None
        #: `cost_model` and `graph_cost_model`, and what they were made of
        self._models: dict[bool, tuple[Device | None, CostModel]] = {}

    @property
    def cost_model(self) -> CostModel:
        """What levels cost with these heads on this device: `pack_hybrid_for_flashinfer(ids, cost_model=...)`.

        Made once: it remembers what it has chosen.
        """
        return self._model(in_graphs=False)

    @property
    def graph_cost_model(self) -> CostModel:
        """The same for steps that `DecodeGraphs` replays, which do without the kernel for short lists; made once."""
        return self._model(in_graphs=True)

    def _model(self, *, in_graphs: bool) -> CostModel:
        costs, manager = self._impl.costs, self.manager
        made_of, model = self._models.get(in_graphs, (None, None))
        if model is None or made_of is not costs:
            device = evolve(costs or Device(), has_short=False) if in_graphs else costs
            sizes = (self.num_qo_heads, manager.num_heads, manager.head_dim, manager.dtype.itemsize)
            model = CostModel.for_heads(*sizes, device=device)
            self._models[in_graphs] = costs, model
        return model

    def plan(
        self,
        packed: FlashInferPackedData | FlashInferHybridData,
        *,
        query_lens: Sequence[int] | None = None,
        causal: bool = True,
    ) -> None:
        """Prepares for a batch; valid until the next `plan`. The packed tensors may be reused afterwards.

        Args:
            packed: the batch, plain or hybrid; on the CPU, or this waits for the device.
            query_lens: query rows of each sequence, in the caller's order; None for one each, or for hybrid data those
                it was packed with. Plain data may have sequences without rows.
            causal: row i of a sequence's m rows is its token `num_tokens - m + i` and sees no token after that. False:
                every row sees the whole sequence.

        Raises:
            TensorError: `packed` is of another type.
            LengthError: query_lens that do not fit, or more causal rows than tokens.
            PageError: a page that the manager does not have.

        The plan before stays if this raises. Cost: O(pages) on the CPU.
        """
        plan = self._planner.plan(packed, query_lens, causal=causal)
        permute = plan.rows is not None and not self._impl.orders_rows
        rows = torch.from_numpy(plan.rows).to(self.manager.device) if permute else None
        prepared = self._impl.prepare(plan)
        self._shape = (plan.num_rows, self.num_qo_heads, self.manager.head_dim)
        self._prepared, self._rows = prepared, rows

    @overload
    def run(self, q: torch.Tensor, *, layer: int = 0, return_lse: Literal[False] = False) -> torch.Tensor: ...

    @overload
    def run(
        self, q: torch.Tensor, *, layer: int = 0, return_lse: Literal[True]
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def run(
        self, q: torch.Tensor, *, layer: int = 0, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch in one layer; no gradient.

        May be captured in a CUDA graph after a first run: replays compute the batch that was planned at the capture.
        After the next `plan` but one it must not be replayed: its memory is another plan's. `DecodeGraphs` captures
        graphs that are replayed for later batches.

        Args:
            q: query rows of all sequences in the caller's order, [rows, num_qo_heads, head_dim], float16, bfloat16,
                float32 or float64, on the cache's device.
            layer: the layer of the cache to read.
            return_lse: return the log-sum-exp of the scores too.

        Returns:
            The output, like `q`; with `return_lse` also float32 [rows, num_qo_heads], base 2. A row that sees no token
            has output 0 and -inf.

        Raises:
            SeqAttnError: nothing is planned.
            TensorError: `q` has a wrong shape, dtype or device.
            LengthError: `layer` is out of range.
        """
        if self._shape is None:
            raise SeqAttnError("run needs a plan: call plan(packed) first, once a step")
        self.check_queries(q, self._shape)
        if q.requires_grad and torch.is_grad_enabled():
            with torch.no_grad():
                out, lse = self._run(q, layer, return_lse=return_lse)
        else:
            out, lse = self._run(q, layer, return_lse=return_lse)
        return (out, lse) if return_lse else out

    def _run(self, q: torch.Tensor, layer: int, *, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if self._rows is None:
            return self._impl.run(q, layer, self._prepared, return_lse=return_lse)
        grouped_out, grouped_lse = self._impl.run(q[self._rows], layer, self._prepared, return_lse=return_lse)
        out, lse = torch.empty_like(grouped_out), torch.empty_like(grouped_lse)
        out[self._rows], lse[self._rows] = grouped_out, grouped_lse
        return out, lse

    def check_queries(self, q: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Refuses queries of another shape, dtype or device; raises TensorError."""
        # Callers without type checks pass lists and arrays.
        given: object = q
        if not isinstance(given, torch.Tensor) or given.dtype not in _QUERY_DTYPES:
            seen = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
            raise TensorError(f"q must be a float16, bfloat16, float32 or float64 tensor, not {seen}")
        if given.shape != shape:
            wanted = list(shape)
            raise TensorError(f"q has shape {list(given.shape)} but the plan needs {wanted} (rows, heads, head_dim)")
        if given.device != self.manager.device:
            raise TensorError(f"q is on {given.device} but the cache on {self.manager.device}: move it there first")


def _best_backend(manager: PagedKVCacheManager) -> str:
    if manager.device.type != "cuda" or find_spec("flashinfer") is None:
        return "torch"
    reason: str | None = import_module("seqattn.attention.flashinfer_backend").why_not(manager)
    return "torch" if reason is not None else "flashinfer"


def _backend_class(name: str) -> type[Any]:
    if not isinstance(name, str) or name not in _BACKENDS:
        known = ", ".join(repr(known) for known in ("auto", *_BACKENDS))
        raise BadValueError(f"backend {name!r} is not available in this version: use one of {known}")
    module, _, cls = _BACKENDS[name].partition(":")
    found: type[Any] = getattr(import_module(module), cls)
    return found


def _positive(name: str, value: float) -> float:
    # numpy's numbers are real ones too; its booleans and torch's tensors are not.
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else 0.0
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise BadValueError(f"{name} must be a positive number, not {value!r}")
    return number
