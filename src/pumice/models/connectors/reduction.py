"""Fewer image tokens: neighbouring patches merged before any connector.

`shuffle2x2+mlp2x_gelu` lays the channels of 2 x 2 patches side by side, `average2x2+linear`
averages them. Shapes: N views, P patches, Dv their width, k the side of a merged block.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from pumice.core.errors import PumiceError
from pumice.models.connectors.base import Connector, Instruction, Sizes, grid_side

_NAME = re.compile(r"(shuffle|average)([2-9])x([2-9])\+(.+)")


class ReducedConnector(Connector):
    """Merges k x k patches and hands the smaller grid to the connector `inner`."""

    def __init__(self, sizes: Sizes, kind: str, factor: int, inner: Connector) -> None:
        super().__init__()
        self.kind = kind
        self.factor = factor
        self.inner = inner
        self.wants_instruction = inner.wants_instruction
        self.describe(sizes, inner.num_tokens, inner.side, inner.options)

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        instruction: Instruction | None = None,
    ) -> torch.Tensor:
        """float[N, P, Dv], bool[N, P] | None -> float[N, Q, D]."""
        blocks = merge_blocks(features, self.factor)
        merged = blocks.flatten(2) if self.kind == "shuffle" else blocks.mean(2)
        if mask is not None:
            # A merged patch holds picture as soon as one of its patches does.
            mask = merge_blocks(mask.unsqueeze(-1), self.factor).any(2).squeeze(-1)
        tokens: torch.Tensor = self.inner(merged, mask, instruction)
        return tokens


def merge_blocks(features: torch.Tensor, factor: int) -> torch.Tensor:
    """[N, P, C] -> [N, P / k^2, k^2, C]: blocks and the patches in them, both in reading order."""
    side = grid_side(features.shape[1])
    assert side is not None and side % factor == 0
    views, patches, channels = features.shape
    grid = features.reshape(views, side // factor, factor, side // factor, factor, channels)
    return grid.transpose(2, 3).reshape(views, patches // factor**2, factor**2, channels)


def is_reduction(name: str) -> bool:
    """Whether a connector's name begins with a merge."""
    return _NAME.fullmatch(name) is not None


def build_reduced(
    name: str,
    sizes: Sizes,
    options: dict[str, Any],
    build: Callable[[str, Sizes, dict[str, Any]], Connector],
) -> Connector:
    """The connector after `+`, built by `build` for the merged grid; options are its own."""
    match = _NAME.fullmatch(name)
    assert match is not None
    kind, factor, inner = match[1], int(match[2]), match[4]
    if match[2] != match[3]:
        raise PumiceError(
            f"connector {name!r} merges blocks of {match[2]} x {match[3]} patches; only square "
            f"blocks are allowed, such as {kind}2x2."
        )
    side = grid_side(sizes.num_patches)
    if side is None:
        raise PumiceError(
            f"connector {name!r} merges neighbouring patches, and {sizes.num_patches} features are "
            f"no square grid: a class token stands with them. Set vision_select: patch."
        )
    if side % factor:
        raise PumiceError(
            f"connector {name!r} merges blocks of {factor} x {factor} patches, and a grid of "
            f"{side} x {side} does not divide into them. Choose a vision backbone whose grid has "
            f"a side divisible by {factor}, or another connector."
        )
    width = sizes.in_dim * factor**2 if kind == "shuffle" else sizes.in_dim
    merged = Sizes(width, sizes.out_dim, (side // factor) ** 2, sizes.vocab_size)
    return ReducedConnector(sizes, kind, factor, build(inner, merged, options))
