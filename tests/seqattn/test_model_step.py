"""A model of transformers decodes through `DecodeGraphs`: on CUDA its whole forward pass is one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqattn import CacheDescriptor, DecodeGraphs, DecodeStep, PagedAttention, PagedKVCacheManager

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("default")  # the library's own

NAME = "seqattn-decode-step"
PROMPT, ANSWER = 40, 30


class Decoder:
    """A small Llama whose attention is a decode step's; and the same weights with attention as transformers has it."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        options = {
            "vocab_size": 100,
            "hidden_size": 512,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 256,
        }
        transformers.AttentionInterface.register(NAME, self.attend)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**options, attn_implementation="eager")
        self.dense = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
        config = transformers.LlamaConfig(**options, attn_implementation=NAME)
        self.model = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
        self.model.load_state_dict(self.dense.state_dict())
        self.manager = PagedKVCacheManager(100, 16, 2, 128, dtype, device, num_layers=3)
        self.descriptor = CacheDescriptor(self.manager)
        self.attention = PagedAttention(self.manager, 8)
        self.graphs = DecodeGraphs(self.attention, self.step, [1, 8], max_tokens=PROMPT + ANSWER)
        self.now: DecodeStep | None = None

    def step(self, step: DecodeStep, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.now = step
        logits: torch.Tensor = self.model(tokens[:, None], position_ids=positions[:, None], use_cache=False).logits
        return logits[:, 0]

    def attend(
        self, module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, None]:
        assert self.now is not None
        layer: Any = module.layer_idx
        self.now.append_kv(k[:, :, 0], v[:, :, 0], layer=layer)
        return self.now.run(q[:, :, 0], layer=layer)[:, None], None

    def decode(self, ids: list[Any], tokens: torch.Tensor, *, hybrid: bool = False) -> torch.Tensor:
        """Logits of each token; `tokens` has a row for each sequence."""
        found = []
        for column in tokens.T:
            known = self.descriptor.seq_id_to_data
            starts = [known[i].num_tokens(16) if i in known else 0 for i in ids]
            self.descriptor.allocate(ids, [1] * len(ids))
            pack = self.descriptor.pack_for_flashinfer
            data = self.descriptor.pack_hybrid_for_flashinfer(ids, cost_model=None) if hybrid else pack(ids)
            positions = torch.tensor(starts, device=tokens.device)
            found.append(self.graphs.replay(data, column.contiguous(), positions).clone())
        return torch.stack(found, dim=1)


@pytest.mark.parametrize(
    ("device", "dtype", "most_error"),
    [("cpu", torch.float32, 1e-4), pytest.param("cuda", torch.bfloat16, 3e-2, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("hybrid", [False, True], ids=["plain", "hybrid"])
@torch.no_grad()
def test_decoding_in_steps_gives_the_logits_of_the_whole(
    device: str, dtype: torch.dtype, most_error: float, hybrid: bool
) -> None:
    decoder = Decoder(device, dtype)
    tokens = torch.randint(100, (6, PROMPT + ANSWER), generator=torch.Generator().manual_seed(1)).to(device)
    tokens[:, :PROMPT] = tokens[0, :PROMPT]
    expected = decoder.dense(tokens).logits.float()
    logits = decoder.decode(["prompt"], tokens[:1, :PROMPT])
    for i in range(6):
        decoder.descriptor.fork("prompt", i)
    answers = decoder.decode(list(range(6)), tokens[:, PROMPT:], hybrid=hybrid)
    for found, wanted in ((logits, expected[:1, :PROMPT]), (answers, expected[:, PROMPT:])):
        error = (found.float() - wanted).norm() / wanted.norm()
        assert error < most_error
    if device == "cuda":
        assert decoder.graphs.num_captures == 2
        assert decoder.graphs.num_eager == 2
    assert decoder.graphs.num_replays + decoder.graphs.num_eager == PROMPT + ANSWER
