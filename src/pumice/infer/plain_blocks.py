"""The blocks of a decoder of the Llama kind, as products and norms laid out for answering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pumice.infer.pages import Pages
from pumice.infer.products import Norm, Product, product
from pumice.models.quantize import QuantizedLinear

MOST_COPIED = 4 * 1024**3
"""Bytes of copied weights that are worth their place."""


@dataclass(slots=True)
class Block:
    """One block; queries and keys have those numbers side by side that are turned together."""

    norm: Norm
    qkv: Product
    out: Product
    feed_norm: Norm
    gate_up: Product
    down: Product
    activation: Callable[[torch.Tensor], torch.Tensor]
    scaling: float
    query_norm: Norm | None
    key_norm: Norm | None


def block_of(layer: Any, pages: Pages, copies: bool) -> Block:
    """A block of transformers'; quantised weights are copied with `copies` alone."""
    attention, feed = layer.self_attn, layer.mlp
    pairs = _pairs(attention.head_dim)
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    turned = linears[0].out_features + linears[1].out_features
    order = torch.arange(turned + linears[2].out_features)
    order[:turned] = order[:turned].view(-1, len(pairs))[:, pairs].flatten()
    normed = hasattr(attention, "q_norm")
    return Block(
        norm=Norm(layer.input_layernorm),
        qkv=product(linears, pages, order.to(linears[0].weight.device), copies),
        out=product([attention.o_proj], pages, copies=copies),
        feed_norm=Norm(layer.post_attention_layernorm),
        gate_up=product([feed.gate_proj, feed.up_proj], pages, copies=copies),
        down=product([feed.down_proj], pages, copies=copies),
        activation=feed.act_fn.forward,
        scaling=attention.scaling,
        query_norm=Norm(attention.q_norm, pairs) if normed else None,
        key_norm=Norm(attention.k_norm, pairs) if normed else None,
    )


def _pairs(width: int) -> torch.Tensor:
    """The order of a head's numbers in which those turned together stand side by side.

    Queries and keys are in the same order, so their products are as before; each pair is then one
    complex number, and turning all of them is one multiplication.
    """
    return torch.arange(width).view(2, -1).t().flatten()


def plain_bytes(model: nn.Module) -> int:
    """What the weights of its linear layers take that are not quantised."""
    return sum(m.weight.nbytes for m in model.modules() if type(m) is nn.Linear)


def copied_bytes(model: nn.Module) -> int:
    """What copies of its linear layers take: two in float32, or two in 8 bits."""
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    eight = sum(2 * layer.in_features * layer.out_features for layer in quantized)
    return 2 * plain_bytes(model) + eight
