"""Which models can be served, found out by asking them: one forward of two tokens through a probe.

What cannot be served is refused with the reason. Pages are shared between sequences and read by position, so every
layer must attend to all earlier tokens, with keys that depend on nothing but the tokens before and their positions.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from attrs import define, field

from radix.integrations.transformers.attention import NAME, register
from seqattn.cache import PagedKVCacheManager
from seqattn.errors import BadValueError, MissingExtraError, ModelError, SeqAttnError, TensorError

if TYPE_CHECKING:
    from seqattn.pages import PageAllocator

__all__ = ["Model", "ModelShape", "describe", "manager_for"]

#: a causal language model of transformers
Model: TypeAlias = Any


@define(slots=True, frozen=True)
class ModelShape:
    """What the cache and the attention need to know of a model.

    Attributes:
        name: its class.
        num_layers: layers with attention.
        num_qo_heads, num_kv_heads, head_dim: of each layer.
        sm_scale: factor of the scores; None for 1 / sqrt(head_dim).
        dtype: of keys and values.
        device: of the model.
        vocab_size: token ids that it knows.
        max_positions: tokens of the longest sequence; None if it does not say.
        keeps_logits: whether its forward computes only the logits that are asked for (`logits_to_keep`).
    """

    name: str
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    sm_scale: float | None
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_positions: int | None
    keeps_logits: bool

    def check_manager(self, manager: PageAllocator) -> PagedKVCacheManager:
        """The manager, if its memory is for this model.

        Raises:
            TensorError: it has no memory, or memory of another shape, dtype or device.
        """
        if not isinstance(manager, PagedKVCacheManager):
            raise TensorError(f"a model needs the KV memory of a PagedKVCacheManager, not {type(manager).__name__}")
        pairs = [
            ("num_layers", manager.num_layers, self.num_layers),
            ("num_heads", manager.num_heads, self.num_kv_heads),
            ("head_dim", manager.head_dim, self.head_dim),
            ("dtype", manager.dtype, self.dtype),
            ("device", manager.device, self.device),
        ]
        for name, has, needs in pairs:
            if has != needs:
                raise TensorError(f"the cache has {name} {has} but {self.name} needs {needs}: use manager_for(model)")
        return manager


def manager_for(
    model: Model, *, num_pages: int, page_size: int = 16, kv_layout: str = "NHD", device: torch.device | None = None
) -> PagedKVCacheManager:
    """A cache of the model's shape, dtype and device.

    Args:
        model: a causal language model of transformers.
        num_pages: pages in all; one takes `2 * num_layers * page_size * num_kv_heads * head_dim` elements.
        page_size: token slots in a page.
        kv_layout: "NHD" or "HND".
        device: None for the model's.

    Raises:
        ModelError: the model cannot be served.
        BadValueError: a size below 1, or an unknown layout.

    Cost: a forward of two tokens, and the memory.
    """
    shape = describe(model)
    sizes = (num_pages, page_size, shape.num_kv_heads, shape.head_dim, shape.dtype)
    return PagedKVCacheManager(*sizes, device or shape.device, kv_layout, num_layers=shape.num_layers)


def describe(model: Model) -> ModelShape:
    """Finds out the shape of a model; it keeps the attention that it had.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelError: the model cannot be served.
        BadValueError: it is in training mode.

    Cost: a forward of two tokens.
    """
    try:
        register()
    except ImportError as error:
        raise MissingExtraError("chat", "transformers") from error
    _refuse_kind(model)
    had = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        if model.config._attn_implementation != NAME:
            raise ModelError(type(model).__name__, "no support for the attention interface")
        probe = _ask(model)
    finally:
        model.set_attn_implementation(had)
    return _shape(model, probe)


@define(slots=True, eq=False)
class _Probe:
    """Takes the place of a step, and notes what each layer brings; attention of nothing is 0."""

    calls: list[tuple[int, int, int, int, float | None]] = field(factory=list)
    value_dims: set[int] = field(factory=set)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(factory=lambda: torch.device("cpu"))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Notes the call; the shapes are those of `Call.attend`."""
        self.calls.append((layer, query.shape[1], key.shape[1], key.shape[3], scaling))
        self.value_dims.add(value.shape[3])
        self.dtype, self.device = key.dtype, key.device
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def _refuse_kind(model: Model) -> None:
    """Refuses what a look at the configuration tells."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise ModelError(name, "no support for the attention interface of transformers")
    if config.is_encoder_decoder:
        raise ModelError(name, "an encoder, whose output is no prefix of tokens")
    config = config.get_text_config()
    if model._is_stateful:
        raise ModelError(name, "a recurrent state, which no page holds")
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        raise ModelError(name, f"layers of the kind {', '.join(map(repr, sorted(kinds - {'full_attention'})))}")
    window = getattr(config, "sliding_window", None)
    if window is not None and not kinds and getattr(config, "use_sliding_window", True):
        raise ModelError(name, f"a sliding window of {window} tokens: set config.sliding_window = None to do without")
    if getattr(config, "alibi", False):
        raise ModelError(name, "a position bias (ALiBi)")
    for kind in ("dynamic", "longrope"):
        if kind in _rope_types(config):
            raise ModelError(name, f"rotary positions of type {kind!r}, which change with the length of a sequence")
    if model.training:
        raise BadValueError(f"{name} is in training mode, where outputs are random: call model.eval() first")


def _rope_types(config: Any) -> set[object]:  # noqa: ANN401  a configuration of transformers
    """Types of rotary positions, of all layers or for each kind of layer."""
    found: set[object] = set()
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(config, name, None) or {}
        for entry in (given, *given.values()):
            if isinstance(entry, dict):
                found.add(entry.get("rope_type", entry.get("type")))
    return found


def _ask(model: Model) -> _Probe:
    """Runs two tokens through the probe."""
    name, probe = type(model).__name__, _Probe()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(name, "no argument position_ids: sequences of different lengths cannot be one batch")
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    with torch.inference_mode():
        try:
            output = model(input_ids=ids, position_ids=positions, use_cache=False, radix_step=probe)
        except ModelError:
            raise
        except (TypeError, SeqAttnError) as error:
            if "radix_step" not in str(error):
                raise
            raise ModelError(name, "a forward that hands no keywords on to its attention") from error
    if getattr(output, "logits", None) is None:
        raise ModelError(name, "no language-model head: load it with AutoModelForCausalLM")
    return probe


def _shape(model: Model, probe: _Probe) -> ModelShape:
    name = type(model).__name__
    if [layer for layer, *_ in probe.calls] != list(range(len(probe.calls))) or not probe.calls:
        raise ModelError(name, f"layers that do not attend once each in order, but {[c[0] for c in probe.calls]}")
    kinds = {call[1:] for call in probe.calls}
    if len(kinds) > 1:
        raise ModelError(
            name, f"layers of different shapes or scales (query heads, KV heads, head_dim, scale): {kinds}"
        )
    ((num_qo_heads, num_kv_heads, head_dim, scale),) = kinds
    if probe.value_dims != {head_dim}:
        raise ModelError(name, f"values of {probe.value_dims} elements beside keys of {head_dim}")
    if num_qo_heads % num_kv_heads:
        raise ModelError(name, f"{num_qo_heads} query heads for {num_kv_heads} KV heads")
    return ModelShape(
        name,
        len(probe.calls),
        num_qo_heads,
        num_kv_heads,
        head_dim,
        scale,
        probe.dtype,
        probe.device,
        model.get_input_embeddings().num_embeddings,
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        "logits_to_keep" in inspect.signature(model.forward).parameters,
    )
