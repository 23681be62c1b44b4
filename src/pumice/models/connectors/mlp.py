"""LLaVA-1.5's connector: N linear layers with GELU between, on every patch feature."""

from __future__ import annotations

from torch import nn


class MlpConnector(nn.Sequential):
    """float[N, P, Dv] -> float[N, P, D]; the linear layers stand at 0, 2, 4 ... as in LLaVA."""

    def __init__(self, in_dim: int, out_dim: int, num_patches: int, depth: int) -> None:
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(depth - 1):
            # The exact GELU (erf), not the tanh approximation: LLaVA builder.py uses nn.GELU().
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        super().__init__(*layers)
        self.num_tokens = num_patches


def build_mlp(name: str, in_dim: int, out_dim: int, num_patches: int) -> nn.Module:
    """The connector called mlpNx_gelu, N its linear layers."""
    depth = int(name.removeprefix("mlp").removesuffix("x_gelu"))
    return MlpConnector(in_dim, out_dim, num_patches, depth)
