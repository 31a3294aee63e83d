"""Attention over packed page tables: one front, a backend for each way to compute it, graphs of whole decode steps."""

from __future__ import annotations

from seqattn.attention.front import PagedAttention
from seqattn.attention.graphs import DecodeGraphs
from seqattn.attention.step import DecodeStep

__all__ = ["DecodeGraphs", "DecodeStep", "PagedAttention"]
