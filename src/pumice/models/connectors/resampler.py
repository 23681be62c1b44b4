"""The light resampler: learnable queries that read the features by cross-attention.

With depth 1, its default, each query looks once at the picture and answers with one image token.
Shapes: N views, P features, Dv their width, Q queries, W the resampler's width, D the language
model's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.models.connectors.attention import FeedForward, attend, feature_mask
from pumice.models.connectors.base import (
    Connector,
    Instruction,
    Sizes,
    options_dict,
    read_options,
)

HEAD_WIDTH = 64


@dataclass(frozen=True, slots=True)
class ResamplerOptions:
    """What a recipe may say of a resampler."""

    queries: int = 64
    """Q, the image tokens of one view."""
    depth: int = 1
    """Cross-attention blocks."""
    width: int | None = None
    """W; left out, the width of the vision features: 18 million weights on LLaVA-1.5's backbones,
    where the language model's width would take 220."""
    heads: int | None = None
    """Attention heads; left out, as many as give each a width of 64."""
    position: Literal["sincos", "learnt", "none"] = field(
        default="sincos", metadata={"choices": ("sincos", "learnt", "none")}
    )
    """How a key says where its patch stands."""


class ResamplerBlock(nn.Module):
    """Pre-norm cross-attention and feed-forward, each added to the queries."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 4 * width)

    def forward(
        self,
        queries: torch.Tensor,
        features: torch.Tensor,
        position: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """float[N, Q, W], float[N, P, W], float[P, W], bool[N, P] -> float[N, Q, W]."""
        features = self.feature_norm(features)
        places = features if position is None else features + position
        query, key = self.query(self.query_norm(queries)), self.key(places)
        mixed = attend(query, key, self.value(features), mask, self.heads)
        queries = queries + self.out(mixed)
        fed: torch.Tensor = self.feed_forward(self.norm(queries))
        return queries + fed


class Resampler(Connector):
    """float[N, P, Dv] -> float[N, Q, D], Q whatever the number of patches."""

    def __init__(self, sizes: Sizes, options: ResamplerOptions) -> None:
        super().__init__()
        width = options.width or sizes.in_dim
        heads = _heads(width, options)
        self.queries = nn.Parameter(torch.randn(options.queries, width) * width**-0.5)
        self.enter = nn.Linear(sizes.in_dim, width)
        self.kind = options.position
        if self.kind == "learnt":
            self.position = nn.Parameter(torch.randn(sizes.num_patches, width) * 0.02)
        self.blocks = nn.ModuleList(ResamplerBlock(width, heads) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, sizes.out_dim)
        resolved = {**options_dict(options), "width": width, "heads": heads}
        self.describe(sizes, options.queries, None, resolved)

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        instruction: Instruction | None = None,
    ) -> torch.Tensor:
        """float[N, P, Dv], bool[N, P] | None -> float[N, Q, D]."""
        seen = feature_mask(features, mask)
        features = self.enter(features)
        queries = self.queries.expand(len(features), -1, -1)
        position = self._position(features)
        for block in self.blocks:
            queries = block(queries, features, position, seen)
        tokens: torch.Tensor = self.leave(self.norm(queries))
        return tokens

    def _position(self, features: torch.Tensor) -> torch.Tensor | None:
        if self.kind == "none":
            return None
        if self.kind == "learnt":
            return self.position.to(features.dtype)
        # Made anew each time: a buffer outside the state dict is lost when weights are assigned.
        _, patches, width = features.shape
        return sincos_2d(patches, width, features.device).to(features.dtype)


def build_resampler(name: str, sizes: Sizes, options: dict[str, Any]) -> Connector:
    """A resampler; `name` is its only spelling."""
    return Resampler(sizes, read_options(ResamplerOptions, name, options))


def sincos_2d(num_patches: int, width: int, device: torch.device) -> torch.Tensor:
    """float[P, W]: half the channels say the row, half the column; tokens before the grid say 0."""
    side = math.isqrt(num_patches)
    places = torch.arange(side, device=device)
    quarter = width // 4
    # The wavelengths of "Attention is all you need", from 2 pi to 10000 times that.
    rates = 10000.0 ** -(torch.arange(quarter, device=device) / max(quarter, 1))
    waves = places[:, None] * rates
    line = torch.cat([waves.sin(), waves.cos()], dim=1)
    rows, columns = line.repeat_interleave(side, 0), line.repeat(side, 1)
    table = torch.zeros(num_patches, width, device=device)
    table[num_patches - side * side :, : 4 * quarter] = torch.cat([rows, columns], dim=1)
    return table


def _heads(width: int, options: ResamplerOptions) -> int:
    if options.heads is None:
        # The most heads of at least that width which share the channels out evenly.
        return max(n for n in range(1, max(1, width // HEAD_WIDTH) + 1) if width % n == 0)
    if width % options.heads:
        raise PumiceError(
            f"a resampler of width {width} cannot have {options.heads} heads: the heads share its "
            f"channels evenly. Choose heads that divide {width}, or another width."
        )
    return options.heads
