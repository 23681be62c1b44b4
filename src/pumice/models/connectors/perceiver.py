"""Flamingo's perceiver resampler: learnt latents that read a picture, for gated cross-attention.

Its latents do not enter the text; `models/cross_attention.py` lets the language model look at them.
Source: Flamingo (arXiv 2204.14198), section 2.1 and appendix A.1.1; with the variants IDEFICS has.
Shapes: N views, P features, Dv their width, Q latents, H heads, Dh their width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from pumice.models.connectors.attention import attend, feature_mask
from pumice.models.connectors.base import (
    Connector,
    Instruction,
    Sizes,
    options_dict,
    read_options,
)

Activation = Literal["gelu", "relu", "squared_relu", "silu"]


def _choices(*names: str) -> dict[str, tuple[str, ...]]:
    return {"choices": names}


ACTIVATIONS: tuple[str, ...] = get_args(Activation)
_ACTIVATIONS = _choices(*ACTIVATIONS)


@dataclass(frozen=True, slots=True)
class GatedOptions:
    """What a recipe may say of `gated_cross_attention`: the perceiver first, then the layers."""

    queries: int = 64
    """Q, the latents of one view."""
    depth: int = 6
    """Blocks of the perceiver."""
    heads: int = 8
    """Heads of the perceiver."""
    head_width: int = 64
    """Channels of each of them."""
    latent_qk_norm: bool = False
    """Whether the perceiver's queries and keys are normalised."""
    latent_activation: Activation = field(default="gelu", metadata=_ACTIVATIONS)
    """Within the perceiver's feed-forward layers."""
    every: int = 4
    """A gated layer stands before block 0 of the language model, and before each so-manieth."""
    cross_heads: int | None = None
    """Heads of a gated layer; left out, the language model's."""
    cross_head_width: int | None = None
    """Channels of each of them; left out, the heads share the language model's width."""
    qk_norm: bool = False
    """Whether a gated layer's queries and keys are normalised."""
    norm: Literal["layer", "rms"] = field(default="layer", metadata=_choices("layer", "rms"))
    """The norm of gated layers."""
    norm_eps: float = field(default=1e-5, metadata={"least": 0.0})
    """What that norm adds to the variance."""
    feed_forward: Literal["plain", "glu"] = field(
        default="plain", metadata=_choices("plain", "glu")
    )
    """The form of a gated layer's feed-forward: two linear layers, or three as Llama has them."""
    feed_forward_width: int | None = None
    """Its inner width; left out, four times the language model's."""
    activation: Activation = field(default="gelu", metadata=_ACTIVATIONS)
    """Within it."""
    gate: Literal["scalar", "vector"] = field(
        default="scalar", metadata=_choices("scalar", "vector")
    )
    """One tanh gate for all channels, or one for each."""


class PerceiverBlock(nn.Module):
    """Latents look at features and at themselves; then a feed-forward layer. Both are added."""

    def __init__(self, width: int, options: GatedOptions) -> None:
        super().__init__()
        inner = options.heads * options.head_width
        self.heads = options.heads
        self.activation = options.latent_activation
        self.feature_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if options.latent_qk_norm:
            self.query_norm = nn.LayerNorm(options.head_width)
            self.key_norm = nn.LayerNorm(options.head_width)
        self.out = nn.Linear(inner, width, bias=False)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, latents: torch.Tensor, features: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """float[N, Q, Dv], float[N, P, Dv], bool[N, P + Q] | None -> float[N, Q, Dv]."""
        own = self.latent_norm(latents)
        # Keys and values of features and latents together: a detail of Perceiver and Flamingo.
        every = torch.cat([self.feature_norm(features), own], dim=1)
        query = norm_heads(self.query(own), self.heads, self.query_norm)
        key = norm_heads(self.key(every), self.heads, self.key_norm)
        latents = latents + self.out(attend(query, key, self.value(every), mask, self.heads))
        inner = activate(self.up(self.feed_norm(latents)), self.activation)
        fed: torch.Tensor = self.down(inner)
        return latents + fed


class Perceiver(Connector):
    """float[N, P, Dv] -> float[N, Q, Dv], Q latents of the vision backbone's own width."""

    def __init__(self, sizes: Sizes, options: GatedOptions) -> None:
        super().__init__()
        self.gated = options
        self.latents = nn.Parameter(torch.randn(options.queries, sizes.in_dim))
        self.blocks = nn.ModuleList(
            PerceiverBlock(sizes.in_dim, options) for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(sizes.in_dim)
        self.describe(sizes, options.queries, None, options_dict(options))

    @property
    def media_width(self) -> int:
        """The width of the latents."""
        return self.sizes.in_dim

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        instruction: Instruction | None = None,
    ) -> torch.Tensor:
        """float[N, P, Dv], bool[N, P] | None -> float[N, Q, Dv]."""
        seen = feature_mask(features, mask)
        if seen is not None:
            seen = F.pad(seen, (0, len(self.latents)), value=True)
        latents = self.latents.expand(len(features), -1, -1)
        for block in self.blocks:
            latents = block(latents, features, seen)
        normed: torch.Tensor = self.norm(latents)
        return normed


def build_perceiver(name: str, sizes: Sizes, options: dict[str, Any]) -> Connector:
    """The perceiver of gated cross-attention; `name` is its only spelling."""
    return Perceiver(sizes, read_options(GatedOptions, name, options))


def norm_heads(states: torch.Tensor, heads: int, norm: nn.Module | None) -> torch.Tensor:
    """float[..., H * Dh] -> the same, each head normalised on its own; unchanged without norm."""
    if norm is None:
        return states
    normed: torch.Tensor = norm(states.view(*states.shape[:-1], heads, -1))
    return normed.flatten(-2)


def activate(states: torch.Tensor, name: Activation) -> torch.Tensor:
    """float[...] -> float[...]; `squared_relu` is what Flamingo's paper has."""
    return _FUNCTIONS[name](states)


_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": lambda states: F.relu(states).square(),
    "silu": F.silu,
}
