"""Attention over packed page tables: one front, a backend for each way to compute it."""

from __future__ import annotations

from seqattn.attention.front import PagedAttention

__all__ = ["PagedAttention"]
