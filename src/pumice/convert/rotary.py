"""The two orders of rotary pairs: halves (Hugging Face) and neighbours (Meta, llama2.c, ggml).

Rotary embedding turns pairs of a head's values. Hugging Face pairs value i with value i + d/2;
Meta's checkpoints, llama2.c and ggml's "llama" pair value 2i with 2i + 1. Reordering the rows of
the query and key projections changes one into the other, and attention stays what it was.
"""

from __future__ import annotations

import torch


def to_neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """float[heads * d, ...] in halves -> float[heads * d, ...] with each pair side by side."""
    return _swap(rows, (heads, 2, -1))


def to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """float[heads * d, ...] with each pair side by side -> float[heads * d, ...] in halves."""
    return _swap(rows, (heads, rows.shape[0] // heads // 2, 2))


def _swap(rows: torch.Tensor, split: tuple[int, int, int]) -> torch.Tensor:
    return rows.reshape(*split, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
