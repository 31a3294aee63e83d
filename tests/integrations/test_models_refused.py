"""Models that cannot be served are refused with the reason, and stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from radix import PrefixCache
from radix.integrations.transformers import Engine, manager_for
from radix.integrations.transformers.attention import attend
from seqattn import (
    BadValueError,
    CostModel,
    FlashInferHybridData,
    MissingExtraError,
    ModelError,
    PageAllocator,
    PagedKVCacheManager,
    TensorError,
)
from seqattn.attention import PagedAttention
from seqattn.device import Device
from tests.integrations.byte_tokenizer import ByteTokenizer
from tests.integrations.models import Untyped, make

transformers = pytest.importorskip("transformers", reason="needs the extra chat")

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WINDOW = {"sliding_window": 8, "num_key_value_heads": 2}


def model_of(kind: str, head: str = "ForCausalLM", **options: Untyped) -> Untyped:
    """A small model of any kind that transformers has."""
    config = getattr(transformers, f"{kind}Config")(**options)
    if kind == "GPT2":
        head = "LMHeadModel"
    return getattr(transformers, f"{kind}{head}")(config).eval()


CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("Mistral", "ForCausalLM", SMALL | WINDOW, "a sliding window of 8 tokens"),
    (
        "Qwen2",
        "ForCausalLM",
        SMALL | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
        "layers of the kind 'sliding_attention'",
    ),
    ("Gemma2", "ForCausalLM", SMALL | {"num_key_value_heads": 2, "head_dim": 16}, "'sliding_attention'"),
    (
        "Gemma2",
        "ForCausalLM",
        SMALL | {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2},
        "soft-capped scores",
    ),
    (
        "GptOss",
        "ForCausalLM",
        SMALL
        | {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2, "sliding_window": None}
        | {"num_local_experts": 2, "num_experts_per_tok": 1}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "attention sinks",
    ),
    ("Mamba", "ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}, "a recurrent state"),
    (
        "T5",
        "ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        "an encoder",
    ),
    ("Bloom", "ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2}, "attention interface"),
    (
        "Llama",
        "ForCausalLM",
        SMALL | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rotary positions of type 'dynamic'",
    ),
    ("Llama", "Model", SMALL, "no language-model head"),
]


@pytest.mark.parametrize(("kind", "head", "options", "reason"), CASES, ids=[f"{c[0]} {c[3][:24]}" for c in CASES])
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(
    kind: str, head: str, options: dict[str, Any], reason: str
) -> None:
    model = model_of(kind, head, **options)
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=reason):
        manager_for(model, num_pages=4)
    assert model.config._attn_implementation == before


def test_layers_of_different_scales_are_refused() -> None:
    model = make("Llama")
    model.model.layers[1].self_attn.scaling = 0.5
    with pytest.raises(ModelError, match="layers of different shapes or scales"):
        manager_for(model, num_pages=4)


def test_layers_that_do_not_attend_are_noticed() -> None:
    model = make("Llama")
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(ModelError, match=r"do not attend once each in order, but \[0, 0\]"):
        manager_for(model, num_pages=4)


def test_a_layer_that_stops_attending_is_noticed_in_the_step() -> None:
    engine = Engine.for_model(make("Llama"), num_pages=8)
    engine.model.model.layers[1].forward = lambda hidden, **_: hidden
    request = engine.submit([5, 6, 7], max_new_tokens=3)
    with pytest.raises(ModelError, match="2 layers, of which 1 attended"):
        engine.step()
    assert request.tokens == []
    engine.cache.check()


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(BadValueError, match=r"call model\.eval\(\) first"):
        manager_for(make("Llama").train(), num_pages=4)


def test_what_is_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(ModelError, match="attention interface"):
        manager_for(torch.nn.Linear(2, 2), num_pages=4)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"num_heads": 4}, "num_heads 4 but LlamaForCausalLM needs 2"),
        ({"head_dim": 8}, "head_dim 8 but LlamaForCausalLM needs 12"),
        ({"dtype": torch.float16}, "dtype torch.float16 but LlamaForCausalLM needs torch.float32"),
        ({"num_layers": 3}, "num_layers 3 but LlamaForCausalLM needs 2"),
    ],
)
def test_a_cache_of_another_shape_is_refused(changed: dict[str, Any], problem: str) -> None:
    fitting: dict[str, Any] = {"num_heads": 2, "head_dim": 12, "dtype": torch.float32, "num_layers": 2}
    model = make("Llama")
    Engine(model, None, PrefixCache(PagedKVCacheManager(4, 16, device="cpu", **fitting)))
    with pytest.raises(TensorError, match=problem):
        Engine(model, None, PrefixCache(PagedKVCacheManager(4, 16, device="cpu", **fitting | changed)))


def test_a_cache_without_memory_is_refused() -> None:
    with pytest.raises(TensorError, match="not PageAllocator"):
        Engine(make("Llama"), None, PrefixCache(PageAllocator(4, 16)))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_requests": 0}, "max_requests must be an integer of at least 1"),
        ({"max_tokens_per_step": 8}, "max_tokens_per_step 8 is below max_requests 64"),
        ({"packing": "tight"}, "packing must be 'hybrid' or 'plain', not 'tight'"),
        ({"backend": "cudnn"}, "backend 'cudnn' is not available"),
    ],
)
def test_options_out_of_range_are_refused_and_the_model_stays_as_it_was(options: dict[str, Any], problem: str) -> None:
    model = make("Llama")
    before = model.config._attn_implementation
    with pytest.raises(BadValueError, match=problem):
        Engine(model, None, PrefixCache(manager_for(model, num_pages=4)), **options)
    assert model.config._attn_implementation == before


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Llama")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'seqattn\[chat\]'"):
        manager_for(model, num_pages=4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
        ("OPT", SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 32}),
        ("Granite", SMALL | {"num_key_value_heads": 2, "attention_multiplier": 0.3}),
        ("Olmo2", SMALL | {"num_key_value_heads": 2}),
        ("Qwen3Moe", SMALL | {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_other_decoders_with_full_attention_are_served(kind: str, options: dict[str, Any]) -> None:
    if kind in {"GPT2", "OPT"} and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip(f"{kind} of transformers before 5 makes its own mask or keeps the keywords to itself")
    torch.manual_seed(0)
    model = model_of(kind, pad_token_id=0, eos_token_id=1, bos_token_id=0, **options)
    prompts = [list(range(2, 2 + n)) for n in (3, 20, 11)]
    with torch.no_grad():
        want = [
            model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
            for ids in prompts
        ]
    engine = Engine.for_model(model, num_pages=32)
    for _ in range(2):
        assert [answer.tokens for answer in engine.generate(prompts, max_new_tokens=6)] == want


class Layer(torch.nn.Module):
    """What the attention function sees of a layer."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("layer", "arguments", "reason"),
    [
        (Layer(layer_idx=0), {"attention_mask": torch.ones(1, 1, 2, 2)}, "a mask of its own"),
        (Layer(layer_idx=0), {"is_causal": False}, "not causal"),
        (Layer(layer_idx=0, is_causal=False), {}, "not causal"),
        (Layer(), {}, "layers without a number"),
        (Layer(layer_idx=0), {"position_bias": torch.zeros(2)}, "ALiBi"),
        (Layer(layer_idx=0), {"sliding_window": 4}, "a sliding window"),
    ],
)
def test_attention_of_another_kind_is_refused_by_the_layer(
    layer: Layer, arguments: dict[str, Untyped], reason: str
) -> None:
    rows = torch.zeros(1, 2, 3, 4)
    options: dict[str, Untyped] = {"attention_mask": None, "radix_step": Untouched()}
    with pytest.raises(ModelError, match=f"Layer cannot be served, as it has .*{reason}"):
        attend(layer, rows, rows, rows, **options | arguments)


class Untouched:
    """A step that no layer may reach."""

    def attend(self, *_: object) -> torch.Tensor:
        raise AssertionError("a refused layer attended")


def without_positions(input_ids: object = None, **_: object) -> None:
    """A forward that places tokens by itself."""


def keeps_keywords(input_ids: object = None, position_ids: object = None, **_: object) -> None:
    """A forward whose attention hears nothing of its keywords."""
    rows = torch.zeros(1, 2, 3, 4)
    attend(Layer(layer_idx=0), rows, rows, rows, None)


def without_keywords(input_ids: object = None, position_ids: object = None, use_cache: object = None) -> None:
    """A forward that hands nothing on."""


def breaks(position_ids: object = None, **_: object) -> None:
    """A forward with a fault of its own."""
    raise TypeError("unsupported operand")


@pytest.mark.parametrize(
    ("forward", "error", "problem"),
    [
        (without_positions, ModelError, "no argument position_ids"),
        (without_keywords, ModelError, "hands no keywords on to its attention"),
        (keeps_keywords, ModelError, "hands no keywords on to its attention"),
        (breaks, TypeError, "unsupported operand"),
    ],
)
def test_a_forward_that_cannot_be_given_a_step_is_refused(
    forward: object, error: type[Exception], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("Llama")
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(error, match=problem):
        manager_for(model, num_pages=4)


def test_a_configuration_that_asks_for_alibi_is_refused() -> None:
    model = make("Llama")
    model.config.alibi = True
    with pytest.raises(ModelError, match=r"a position bias \(ALiBi\)"):
        manager_for(model, num_pages=4)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("value", lambda value: value[..., :8], r"values of \{8\} elements beside keys of 12"),
        ("key", lambda key: key.repeat(1, 2, 1, 1)[:, :3], "4 query heads for 3 KV heads"),
    ],
)
def test_shapes_that_no_page_holds_are_refused(
    name: str, change: Untyped, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(module: torch.nn.Module, *rows: torch.Tensor, **others: Untyped) -> Untyped:
        given = dict(zip(("query", "key", "value", "mask"), rows, strict=True))
        output, _ = attend(module, *(given | {name: change(given[name])}).values(), **others)
        return output.new_zeros(*output.shape[:3], 12), None

    model = make("Llama")
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "radix_paged", changed)
    monkeypatch.setattr("radix.integrations.transformers.model.register", lambda: None)
    with pytest.raises(ModelError, match=problem):
        manager_for(model, num_pages=4)


def test_the_end_token_is_the_tokenizers_where_the_model_names_none() -> None:
    model = make("Llama", eos_token_id=None)
    model.generation_config.eos_token_id = None
    assert Engine.for_model(model, num_pages=4).end_tokens == frozenset()
    assert Engine.for_model(model, ByteTokenizer(), num_pages=4).end_tokens == {ByteTokenizer.eos_token_id}
    model.generation_config.eos_token_id = [3, 4]
    assert Engine.for_model(model, ByteTokenizer(), num_pages=4).end_tokens == {3, 4}


@pytest.mark.parametrize("graph_sizes", [None, (2, 4)])
def test_levels_are_weighed_as_graphs_compute_them(monkeypatch: pytest.MonkeyPatch, graph_sizes: Untyped) -> None:
    class OnCuda(PagedAttention):
        def __init__(self, *arguments: Untyped, **options: Untyped) -> None:
            super().__init__(*arguments, **options)
            self.backend = "flashinfer"
            self._impl.costs = Device()

    model = make("Llama")
    monkeypatch.setattr("radix.integrations.transformers.runner.PagedAttention", OnCuda)
    monkeypatch.setattr("radix.integrations.transformers.runner.decoder_for", lambda *_, **__: graph_sizes)
    engine = Engine(model, None, PrefixCache(manager_for(model, num_pages=64)), graph_sizes=graph_sizes)
    model_of_costs: Untyped = engine.runner.cost_model
    assert model_of_costs.device.has_short == (graph_sizes is None)
    engine.close()


def test_a_cost_model_decides_what_is_packed_as_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make("Llama"), []
    never = CostModel(level_overhead_us=1e9)
    for cost_model in (None, never):
        engine = Engine(model, None, PrefixCache(manager_for(model, num_pages=64)), cost_model=cost_model)
        engine.generate([list(range(2, 50))], max_new_tokens=1)
        for last in (60, 61):
            engine.submit([*range(2, 50), last], max_new_tokens=4, stop_tokens=())
        plan = engine.runner.attention.plan

        def noted(data: FlashInferHybridData, plan: Untyped = plan, **options: Untyped) -> None:
            seen.append(len(data.levels))
            plan(data, **options)

        monkeypatch.setattr(engine.runner.attention, "plan", noted)
        engine.step()
        engine.close()
    assert seen == [2, 1]
