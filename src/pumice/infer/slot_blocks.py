"""The blocks of a decoder of the Llama kind, as weights and plain functions of them.

Functions of tensors alone can be compiled once for all blocks, and recorded. Query, key and value
are one weight, gate and up another; the model's own layers become views of these, so that nothing
is held twice. Shapes: N tokens, D model width, H heads, Hk key heads, Dh head width, O outputs, I
inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from pumice.models.quantize import QuantizedLinear


class Weights(NamedTuple):
    """One linear layer, or several that read the same input."""

    weight: torch.Tensor
    """float[O, I], or int8[O, I]"""
    scale: torch.Tensor | None
    """float[O], by which each output of an int8 weight is multiplied."""
    bias: torch.Tensor | None
    """float[O]"""


class SlotBlock(NamedTuple):
    """The weights of one block."""

    norm: torch.Tensor
    qkv: Weights
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    out: Weights
    feed_norm: torch.Tensor
    gate_up: Weights
    down: Weights


@dataclass(frozen=True, slots=True)
class Shape:
    """What the blocks of a decoder have in common."""

    heads: int
    key_heads: int
    width: int
    """Of a head."""
    scaling: float
    epsilon: float
    activation: Callable[[torch.Tensor], torch.Tensor]

    def states(
        self, block: SlotBlock, hidden: torch.Tensor, turns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float[N, D], float[2, N, 1, Dh] -> queries float[N, H, Dh], keys and values [N, Hk, Dh].

        `turns`: see `turned`.
        """
        mixed = linear(rms_norm(hidden, block.norm, self.epsilon), block.qkv)
        heads = mixed.view(len(hidden), -1, self.width)
        both, value = torch.split(heads, [self.heads + self.key_heads, self.key_heads], 1)
        if block.query_norm is not None and block.key_norm is not None:
            query, key = torch.split(both, [self.heads, self.key_heads], 1)
            query = rms_norm(query, block.query_norm, self.epsilon)
            both = torch.cat([query, rms_norm(key, block.key_norm, self.epsilon)], 1)
        query, key = torch.split(turned(both, turns), [self.heads, self.key_heads], 1)
        return query, key, value

    def after(self, block: SlotBlock, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """float[N, D], float[N, H Dh] -> float[N, D]: the rest of a block behind its attention."""
        hidden = linear(mixed, block.out, hidden)
        both = linear(rms_norm(hidden, block.feed_norm, self.epsilon), block.gate_up)
        gate, up = both.chunk(2, -1)
        return linear(self.activation(gate) * up, block.down, hidden)

    def step(
        self,
        block: SlotBlock,
        hidden: torch.Tensor,
        turns: torch.Tensor,
        at: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """One block of a decode step: float[N, D] -> float[N, D].

        `at`: see `written_at`, where the tokens' own are written to keys and values,
        float[N, Hk, S, Dh]; `mask`, float[N, 1, 1, S], is added to the scores.
        """
        query, key, value = self.states(block, hidden, turns)
        rows = len(hidden)
        keys[at] = key
        values[at] = value
        # Query heads that share keys and values are so many queries of one head.
        query = query.reshape(rows, self.key_heads, -1, self.width)
        mixed = mixed_values(query, keys, values, mask, self.scaling)
        return self.after(block, hidden, mixed.flatten(1))

    def written_at(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """long[N], the column of each row's token -> the index of float[N, Hk, S, Dh] of all."""
        # With every dimension in it: through a transposed view, which needs no heads, a compiler
        # copies the keys and values of all columns to write those of one.
        rows, heads = (
            torch.arange(count, device=places.device) for count in (len(places), self.key_heads)
        )
        return rows.unsqueeze(1), heads, places.unsqueeze(1)


def mixed_values(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """float[N, Hk, G, Dh], float[N, Hk, S, Dh] twice, float[N, 1, 1, S] -> float[N, Hk, G, Dh]."""
    if torch.compiler.is_compiling():
        # Of sums a compiler makes loops that read keys and values where they are; torch's kernels
        # give a head to one processor of the GPU, whatever the length of the text.
        scores = (query.float().unsqueeze(3) * keys.float().unsqueeze(2)).sum(-1) * scaling + mask
        mixed = (scores.softmax(-1).unsqueeze(-1) * values.float().unsqueeze(2)).sum(-2)
        return mixed.to(query.dtype)
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
    # On CPU the fused kernel is slower for so few queries, in bfloat16 several times; and so is the
    # product the other way round, which first copies the keys.
    scores = (keys @ query.transpose(-1, -2)).transpose(-1, -2).float() * scaling + mask
    return scores.softmax(-1).to(query.dtype) @ values


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """float[..., D] -> float[..., D], in float32 between."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def linear(x: torch.Tensor, weights: Weights, plus: torch.Tensor | None = None) -> torch.Tensor:
    """float[N, I] -> float[N, O], to which `plus`, float[N, O], is added if given.

    It may be written into `plus`.
    """
    if weights.scale is not None:
        found: torch.Tensor = F.linear(x, weights.weight.to(x.dtype)) * weights.scale.to(x.dtype)
        found = found if weights.bias is None else found + weights.bias.to(x.dtype)
        return found if plus is None else plus + found
    if x.is_cuda and plus is not None and weights.bias is None:
        if not torch.compiler.is_compiling():  # added where it lies, without a kernel more
            return plus.addmm_(x, weights.weight.t())
    found = F.linear(x, weights.weight, weights.bias)
    return found if plus is None else plus + found


def turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """float[N, H, Dh], float[2, N, 1, Dh] -> float[N, H, Dh]: rotated by their positions.

    `turns`: cosines, and sines that are negative in their first half, in float32.
    """
    cos, sin = turns
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def slot_block(layer: Any) -> SlotBlock:
    """The weights of a block of transformers', whose layers become views of them."""
    attention, feed = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    return SlotBlock(
        norm=layer.input_layernorm.weight.detach(),
        qkv=together([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=attention.q_norm.weight.detach() if normed else None,
        key_norm=attention.k_norm.weight.detach() if normed else None,
        out=together([attention.o_proj]),
        feed_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=together([feed.gate_proj, feed.up_proj]),
        down=together([feed.down_proj]),
    )


def together(layers: Sequence[nn.Linear]) -> Weights:
    """Linear layers that read the same input as one; theirs become views of its tensors."""
    scale = None
    if isinstance(layers[0], QuantizedLinear):
        scale = _joined(layers, "scale")
    bias = None if layers[0].bias is None else _joined(layers, "bias")
    return Weights(_joined(layers, "weight"), scale, bias)


def _joined(layers: Sequence[nn.Linear], name: str) -> torch.Tensor:
    held = [getattr(layer, name).detach() for layer in layers]
    whole = _whole(held)
    if whole is None:
        with torch.inference_mode(False):  # else nobody could train the model any more
            whole = torch.cat(held)
        for layer, part in zip(layers, torch.split(whole, [*map(len, held)]), strict=True):
            # The parameter stays the same one, for whoever holds it.
            getattr(layer, name).data = part
    return whole


def _whole(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor that these are all of, one behind the other in memory, if they are."""
    if len(parts) == 1:
        return parts[0]
    first, at = parts[0], parts[0].data_ptr()
    for part in parts:
        shared = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (shared and part.is_contiguous() and part.data_ptr() == at):
            return None
        at += part.nbytes
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
