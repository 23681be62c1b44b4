"""Activation checkpointing: blocks that keep their input alone and are computed again backwards.

A block's own `forward` is wrapped, not the module: no name in a state dict changes, and hooks
(gated layers, sharding) stay outside. The mathematics is that of the block without it, dropout
included, as its random numbers are drawn again from the same state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pumice.core.errors import PumiceError
from pumice.models.lmm import LMM

POLICIES = "none, blocks (each), or every_2, every_3 ... (one block of so many)"


def recompute_every(policy: str) -> int:
    """Each how many-th block is computed again; 0 for none of them."""
    if policy in ("none", "blocks"):
        return int(policy == "blocks")
    match = re.fullmatch(r"every_([1-9]\d*)", policy)
    if match is None:
        raise PumiceError(
            f"checkpointing is {policy!r}; allowed: {POLICIES}. Correct the recipe's line."
        )
    return int(match[1])


def checkpoint_blocks(lmm: LMM, policy: str) -> int:
    """Let the blocks of the decoder, and of a vision backbone that learns, be computed again.

    Gives how many blocks that are.
    """
    every = recompute_every(policy)
    if not every:
        return 0
    chosen = [block for blocks in block_lists(lmm) for block in list(blocks)[::every]]
    for block in chosen:
        _wrap(block)
    return len(chosen)


def block_lists(lmm: LMM) -> Iterator[nn.ModuleList]:
    """The blocks of the language model, then of each vision backbone with weights that learn."""
    from pumice.models.cross_attention import decoder_blocks

    yield decoder_blocks(lmm.language)
    if any(parameter.requires_grad for parameter in lmm.vision.parameters()):
        yield from _vision_blocks(lmm.vision)


def _vision_blocks(vision: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost lists of modules: the blocks of one backbone, or of both of a pair."""
    for child in vision.children():
        if isinstance(child, nn.ModuleList) and not hasattr(child[0], "image_size"):
            yield child
        else:
            yield from _vision_blocks(child)


def _wrap(block: nn.Module) -> None:
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, **kwargs)

    block.forward = forward
