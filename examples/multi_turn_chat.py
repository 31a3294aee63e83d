"""A chat on real pages: every turn reuses what the turns before computed, and answers as if it had computed all anew.

The model is small, random and made of attention alone; its tokens are bytes. Two chats share a system prompt. Each turn
runs twice: through the cache, and cold through an empty one. The replies are the same, the logits equal to rounding.

    python examples/multi_turn_chat.py
"""

import argparse

import torch

from radix import PrefixCache
from seqattn import PagedAttention, PagedKVCacheManager

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 2, 4, 2, 16, 16
SYSTEM = "You are a patient tutor of arithmetic. Answer in one short sentence.\n"
QUESTIONS = {
    "Ann": ["What is 2 + 2?", "And twice that?", "Why?"],
    "Ben": ["What is 7 * 6?", "Is it prime?"],
}


class Model:
    """Attention layers between an embedding and its transpose, over the pages of one cache."""

    def __init__(self, num_pages: int) -> None:
        generator = torch.Generator().manual_seed(0)  # every model has the same weights
        width, kv_width = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
        shapes = [(256, width), (4096, width), *[(width, width + 2 * kv_width), (width, width)] * NUM_LAYERS]
        scaled = [torch.randn(shape, generator=generator, dtype=torch.float64) / width**0.5 for shape in shapes]
        self.embedding, self.positions, *self.layers = scaled
        self.manager = PagedKVCacheManager(
            num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.float64, "cpu", num_layers=NUM_LAYERS
        )
        self.cache, self.attention = PrefixCache(self.manager), PagedAttention(self.manager, NUM_HEADS)

    def logits(self, seq_id: str, tokens: list[int], start: int) -> torch.Tensor:
        """Computes `tokens`, which stand at position `start` of a running sequence; the logits of the last one."""
        packed = self.cache.pack_for_flashinfer([seq_id])
        self.attention.plan(packed, query_lens=[len(tokens)])
        x = self.embedding[tokens] + self.positions[start : start + len(tokens)]
        for layer in range(NUM_LAYERS):
            qkv = (x @ self.layers[2 * layer]).view(len(tokens), -1, HEAD_DIM)
            q, k, v = qkv.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
            self.manager.append_kv(k, v, packed, torch.tensor([0, len(tokens)]), layer=layer)
            x = x + self.attention.run(q.contiguous(), layer=layer).flatten(1) @ self.layers[2 * layer + 1]
        return torch.mv(self.embedding, x[-1])

    def answer(self, prompt: list[int], num_tokens: int = 12) -> tuple[list[int], torch.Tensor, int]:
        """Reply, the logits of each step, and how many prompt tokens were reused."""
        num_cached = self.cache.start("turn", prompt).num_cached_tokens
        steps = [self.logits("turn", prompt[num_cached:], num_cached)]
        reply = [int(steps[-1].argmax())]
        while len(reply) < num_tokens:
            self.cache.extend(["turn"], reply[-1:])  # a sampled token joins when its keys are about to be computed
            steps.append(self.logits("turn", reply[-1:], len(prompt) + len(reply) - 1))
            reply.append(int(steps[-1].argmax()))
        self.cache.finish("turn")
        return reply, torch.stack(steps), num_cached


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model, history = Model(num_pages=64), {name: [*SYSTEM.encode()] for name in QUESTIONS}
    print(f"{'turn':<24}{'prompt':>8}{'reused':>8}{'computed':>10}   logits, cached - cold")
    for turn in range(3):
        for name, questions in QUESTIONS.items():
            if turn < len(questions):
                prompt = history[name] + [*f"{name}: {questions[turn]}\n".encode()]
                reply, logits, num_cached = model.answer(prompt)
                cold_reply, cold_logits, _ = Model(num_pages=64).answer(prompt)
                error = float((logits - cold_logits).abs().max())
                assert reply == cold_reply, f"a cached prefix changed the reply {cold_reply} to {reply}"
                assert error < 1e-9, f"a cached prefix changed the logits by {error}"
                label = f"{name}: {questions[turn]}"
                print(f"{label:<24}{len(prompt):>8}{num_cached:>8}{len(prompt) - num_cached:>10}   {error:.0e}")
                history[name] = prompt + reply
    model.cache.check()
