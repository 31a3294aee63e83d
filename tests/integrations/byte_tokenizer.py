"""A tokenizer of bytes, with what an engine uses of transformers' interface: a character may take four tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NUM_SPECIAL = 4
VOCAB_SIZE = 256 + NUM_SPECIAL


class ByteTokenizer:
    """Token i is the byte i - 4; 0 begins a text, 1 ends it, 2 begins a message, 3 ends it."""

    eos_token_id = 1

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        ids, rest = [0] if add_special_tokens else [], text
        while rest:
            at = min((rest.find(mark) for mark in ("<", ">") if mark in rest), default=len(rest))
            ids += [byte + NUM_SPECIAL for byte in rest[:at].encode()]
            if at < len(rest):
                ids.append(2 if rest[at] == "<" else 3)
            rest = rest[at + 1 :]
        return {"input_ids": ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return bytes(i - NUM_SPECIAL for i in ids if i >= NUM_SPECIAL).decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{message['role']}:{message['content']}>" for message in messages) + "<assistant:"
