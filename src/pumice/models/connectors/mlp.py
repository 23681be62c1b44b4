"""LLaVA-1.5's connector: N linear layers with GELU between, on every patch feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pumice.models.connectors.base import Connector, Instruction, Sizes, grid_side, no_options


class MlpConnector(Connector, nn.Sequential):
    """float[N, P, Dv] -> float[N, P, D]; the linear layers stand at 0, 2, 4 ... as in LLaVA."""

    def __init__(self, sizes: Sizes, depth: int) -> None:
        layers: list[nn.Module] = [nn.Linear(sizes.in_dim, sizes.out_dim)]
        for _ in range(depth - 1):
            # The exact GELU (erf), not the tanh approximation: LLaVA builder.py uses nn.GELU().
            layers += [nn.GELU(), nn.Linear(sizes.out_dim, sizes.out_dim)]
        super().__init__(*layers)
        self.describe(sizes, sizes.num_patches, grid_side(sizes.num_patches), {})

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        instruction: Instruction | None = None,
    ) -> torch.Tensor:
        """float[N, P, Dv] -> float[N, P, D], each patch for itself."""
        for layer in self:
            features = layer(features)
        return features


def build_mlp(name: str, sizes: Sizes, options: dict[str, Any]) -> Connector:
    """The connector called mlpNx_gelu, N its linear layers."""
    no_options(name, options)
    return MlpConnector(sizes, int(name.removeprefix("mlp").removesuffix("x_gelu")))
