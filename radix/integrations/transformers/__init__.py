"""Serving Hugging Face models from a prefix cache: `Engine`; extra `chat`.

    prompt ──submit──▶ waiting ──admit──▶ running ──step──▶ tokens ──▶ finished
                                cache.start        one forward of    cache.finish: a prefix for others
                                                   all requests

    manager = manager_for(model, num_pages=4096)
    engine = Engine(model, tokenizer, PrefixCache(manager))
    (answer,) = engine.generate([[{"role": "user", "content": "What is the capital of France?"}]], max_new_tokens=32)
    answer.text, answer.num_cached_tokens, answer.num_computed_tokens

The model's own code runs unchanged: attention goes through the library's attention interface.
"""

from __future__ import annotations

from radix.integrations.transformers.chat import Chat, sessions_for
from radix.integrations.transformers.engine import Engine
from radix.integrations.transformers.model import ModelShape, manager_for
from radix.integrations.transformers.request import Options, Piece, Request
from radix.integrations.transformers.sampling import Sampling

__all__ = ["Chat", "Engine", "ModelShape", "Options", "Piece", "Request", "Sampling", "manager_for", "sessions_for"]
