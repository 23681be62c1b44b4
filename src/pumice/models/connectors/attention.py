"""Attention of queries to features, and the mask that keeps it on what is picture.

Shapes: N views, H heads, A queries, K keys, W width, P features, G of them patches.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """float[N, A, W], float[N, K, W] twice, bool[N, K] | None -> float[N, A, W]."""
    query, key, value = (_split(x, heads) for x in (query, key, value))
    seen = None if mask is None else mask[:, None, None, :]
    if query.is_cuda:
        mixed = F.scaled_dot_product_attention(query, key, value, seen, dropout)
    else:
        # On CPU the fused kernel is slower at these sizes, in bfloat16 several times.
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        weights = F.dropout(scores.softmax(-1, torch.float32).to(value.dtype), dropout)
        mixed = weights @ value
    return mixed.transpose(1, 2).flatten(2)


def feature_mask(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """float[N, P, Dv], bool[N, G] | None -> bool[N, P] | None, True where a query may look.

    Class and register tokens, the P - G features before the patches, are always seen. A view
    without any picture is seen whole: attention to nothing has no value.
    """
    if mask is None:
        return None
    mask = mask | ~mask.any(-1, keepdim=True)
    return F.pad(mask, (features.shape[1] - mask.shape[1], 0), value=True)


class FeedForward(nn.Sequential):
    """float[..., W] -> float[..., W] through a wider layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def _split(states: torch.Tensor, heads: int) -> torch.Tensor:
    return states.view(*states.shape[:-1], heads, -1).transpose(1, 2)
