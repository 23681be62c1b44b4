"""LLaVA v1's connector: one linear layer on every patch feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pumice.models.connectors.base import Connector, Instruction, Sizes, grid_side, no_options


class LinearConnector(Connector, nn.Linear):
    """float[N, P, Dv] -> float[N, P, D]; keys `weight` and `bias`, as LLaVA names them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.in_dim, sizes.out_dim)
        self.describe(sizes, sizes.num_patches, grid_side(sizes.num_patches), {})

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        instruction: Instruction | None = None,
    ) -> torch.Tensor:
        """float[N, P, Dv] -> float[N, P, D], each patch for itself."""
        return nn.Linear.forward(self, features)


def build_linear(name: str, sizes: Sizes, options: dict[str, Any]) -> Connector:
    """A linear connector; `name` is its only spelling."""
    no_options(name, options)
    return LinearConnector(sizes)
