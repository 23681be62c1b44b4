"""The blocks of CLIP and SigLIP with fewer and larger operations than transformers' own.

Query, key and value are one product; bias, activation and residual are part of the product before
them (oneDNN), which saves a pass over memory each. Before it is used it must agree with
transformers on the model at hand. Used in float32 on the CPU, for plain linear layers without
hooks; every other vision backbone runs as transformers has it.
Shapes: N images, T positions, D width, H heads, Dh head width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from pumice.infer.onednn import BlockedLinear

log = logging.getLogger(__name__)

# An activation -> oneDNN's name and variant, and what its input and output are multiplied by:
# x * sigmoid(1.702 x), CLIP's, is oneDNN's x * sigmoid(x) of 1.702 x, divided by 1.702.
_ACTIVATIONS = {
    "gelu": ("gelu", "none", 1.0),
    "gelu_pytorch_tanh": ("gelu", "tanh", 1.0),
    "quick_gelu": ("swish", "", 1.702),
}
# Copies of the weights take no more than this: CLIP-L has 1.2 GB, SigLIP-SO400M 1.6.
_MOST_BYTES = 2 * 1024**3
_TOLERANCE = 1e-3


@dataclass(slots=True)
class _Block:
    norm: nn.Module
    qkv: BlockedLinear
    out: BlockedLinear
    feed_norm: nn.Module
    up: BlockedLinear
    down: BlockedLinear
    scaling: float


class PlainEncoder:
    """The blocks of one encoder; stands in for its `forward`."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self._heads: int = encoder.layers[0].self_attn.num_heads
        self._blocks = [_block(layer, encoder.config.hidden_act) for layer in encoder.layers]

    def __call__(self, inputs_embeds: torch.Tensor, **_options: object) -> BaseModelOutput:
        """float[N, T, D] -> float[N, T, D] behind the last block."""
        images, positions, width = inputs_embeds.shape
        hidden = inputs_embeds.reshape(-1, width)
        for block in self._blocks:
            states = block.qkv(block.norm(hidden))
            states = states.view(images, positions, 3, self._heads, width // self._heads)
            query, key, value = states.permute(2, 0, 3, 1, 4).unbind(0)
            found = F.scaled_dot_product_attention(query, key, value, scale=block.scaling)
            hidden = block.out(found.transpose(1, 2).reshape(-1, width), hidden)
            hidden = block.down(block.up(block.feed_norm(hidden)), hidden)
        return BaseModelOutput(last_hidden_state=hidden.view(inputs_embeds.shape))


@torch.no_grad()
def plain_encoders(vision: nn.Module) -> list[PlainEncoder]:
    """Stand-ins for those encoders of a vision backbone, or of a pair, that can have one."""
    encoders = [m for m in vision.modules() if isinstance(m, CLIPEncoder | SiglipEncoder)]
    stand_ins = [PlainEncoder(encoder) for encoder in encoders if _fits(encoder)]
    return [stand_in for stand_in in stand_ins if _agrees(stand_in)]


@contextmanager
def standing_in(encoders: Sequence[PlainEncoder]) -> Iterator[None]:
    """While it lasts, these compute what the encoders they were made of would."""
    for stand_in in encoders:
        stand_in.encoder.forward = stand_in
    try:
        yield
    finally:
        for stand_in in encoders:
            del stand_in.encoder.forward


def _fits(encoder: Any) -> bool:
    weights = list(encoder.parameters())
    if not all(map(BlockedLinear.can_hold, weights)):
        return False
    if encoder.config.hidden_act not in _ACTIVATIONS:
        return False
    if sum(weight.nbytes for weight in weights) > _MOST_BYTES:
        return False
    modules = list(encoder.modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return False  # someone listens to, or changes, what the blocks say
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    return len(linears) == 6 * len(encoder.layers) and all(
        type(m) is nn.Linear and m.bias is not None for m in linears
    )


@torch.inference_mode()
def _agrees(stand_in: PlainEncoder) -> bool:
    draw = torch.Generator().manual_seed(0)
    width = stand_in.encoder.config.hidden_size
    given = torch.randn(2, 5, width, generator=draw)
    theirs = stand_in.encoder(inputs_embeds=given).last_hidden_state
    apart = (stand_in(given).last_hidden_state - theirs).abs().max() / theirs.abs().max()
    if apart < _TOLERANCE:
        return True
    log.warning(
        "the vision backbone (%s) does not compute what its family does (features are %.2g apart, "
        "relative to the largest); transformers' own code is used.",
        stand_in.encoder.config.model_type,
        float(apart),
    )
    return False


def _block(layer: Any, activation: str) -> _Block:
    attention, feed = layer.self_attn, layer.mlp
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    name, variant, factor = _ACTIVATIONS[activation]
    weights = torch.cat([part.weight.detach() for part in inputs])
    return _Block(
        norm=layer.layer_norm1,
        qkv=BlockedLinear(weights, torch.cat([part.bias.detach() for part in inputs])),
        out=BlockedLinear(attention.out_proj.weight.detach(), attention.out_proj.bias.detach()),
        feed_norm=layer.layer_norm2,
        up=BlockedLinear(
            feed.fc1.weight.detach() * factor, feed.fc1.bias.detach() * factor, (name, variant)
        ),
        down=BlockedLinear(feed.fc2.weight.detach() / factor, feed.fc2.bias.detach()),
        scaling=attention.scale,
    )
