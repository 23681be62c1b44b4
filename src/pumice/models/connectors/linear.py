"""LLaVA v1's connector: one linear layer on every patch feature."""

from __future__ import annotations

from torch import nn


class LinearConnector(nn.Linear):
    """float[N, P, Dv] -> float[N, P, D]; keys `weight` and `bias`, as LLaVA names them."""

    def __init__(self, in_dim: int, out_dim: int, num_patches: int) -> None:
        super().__init__(in_dim, out_dim)
        self.num_tokens = num_patches


def build_linear(name: str, in_dim: int, out_dim: int, num_patches: int) -> nn.Module:
    """A linear connector; `name` is its only spelling."""
    return LinearConnector(in_dim, out_dim, num_patches)
