"""Conversations of two turns, the project's own: what the tests of real models have where no recorded ones are."""

from __future__ import annotations

__all__ = ["OURS"]

#: the first message and the second
OURS = [
    (
        "Suggest a name for a small bakery that sells bread and cakes by the harbour.",
        "Shorter, please, and say why you chose it.",
    ),
    (
        "A train leaves at nine and needs two hours and a half. When does it arrive?",
        "And if it starts forty minutes late?",
    ),
    (
        "Explain to a child why the moon changes its shape.",
        "Now explain it in one sentence to a grown-up.",
    ),
    (
        "Write a Python function that counts the vowels of a word.",
        "Make it treat capital letters like small ones.",
    ),
    (
        "Translate into French: Good morning! Where is the library?",
        "And how would I thank somebody for the answer?",
    ),
    (
        "List three things that I should pack for a walk in the rain.",
        "Which of them can I leave at home if the sun comes out?",
    ),
]
