"""Any Hugging Face vision transformer as a vision backbone that stops at the layer it needs.

Shapes: N images or tiles, H = W image side, P patch features, Dv vision width.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.models.pretrained import (
    default_attention,
    load_pretrained,
    read_config,
    without_init,
)

Select = Literal["patch", "cls_patch"]
Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


class VisionBackbone(nn.Module):
    """`float[N, 3, H, W] -> float[N, P, Dv]`: the output of block `layer`, without a final norm.

    `layer` counts as in transformers' hidden_states: 1 is the first block's output, -1 the last's,
    -2 (LLaVA) the one before. Later blocks and the end pieces are neither run nor stored.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        select: Select,
        *,
        model: nn.Module | None = None,
        attention: str | None = None,
        init: bool = True,
    ) -> None:
        super().__init__()
        if select not in ("patch", "cls_patch"):
            raise PumiceError(
                f"vision_select is {select!r}; allowed: patch (drop the class token), cls_patch."
            )
        config = vision_part(config)
        if model is None:
            model = _new_model(_cut_config(config, layer), attention, init)
        for name in _end_pieces(model, num_blocks(config, layer)):
            setattr(model, name, nn.Identity())
        self.model = model
        self.config = config
        self.layer = layer
        self.select = select
        self.hidden_size: int = config.hidden_size
        self.image_size: int = config.image_size
        self.patch_size: int = config.patch_size
        self.num_patches: int = (self.image_size // self.patch_size) ** 2
        self.num_prefix_tokens: int = self._count_tokens() - self.num_patches
        if select == "cls_patch" and self.num_prefix_tokens == 0:
            raise PumiceError(
                f"vision_select cls_patch needs a class token, and a {config.model_type} has none; "
                f"use patch."
            )

    @classmethod
    def from_folder(
        cls, path: Path | str, layer: int, select: Select, *, attention: str | None = None
    ) -> VisionBackbone:
        """The vision backbone of a Hugging Face folder (of a whole CLIP: its vision half)."""
        config = vision_part(read_config(path, part="vision backbone"))
        blocks = num_blocks(config, layer)
        model = load_pretrained(
            AutoModel,
            Path(path),
            _cut_config(config, layer),
            attention,
            part="vision backbone",
            spare=lambda model: _end_pieces(model, blocks),
        )
        return cls(config, layer, select, model=model)

    @property
    def num_tokens(self) -> int:
        """P, the features that come out for one image."""
        return self.num_patches + (self.num_prefix_tokens if self.select == "cls_patch" else 0)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[N, 3, H, W] -> float[N, P, Dv]; no graph is kept when every weight is frozen."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(learns):
            features: torch.Tensor = self.model(pixel_values).last_hidden_state
        return features[:, self.num_prefix_tokens :] if self.select == "patch" else features

    def _count_tokens(self) -> int:
        weight = next(self.model.parameters())
        blank = weight.new_zeros(1, 3, self.image_size, self.image_size)
        with torch.no_grad():
            return int(self.model(blank).last_hidden_state.shape[1])


def vision_part(config: Any) -> Any:
    """The vision half of a config that has one (CLIP, SigLIP), else the config itself."""
    config = getattr(config, "vision_config", config)
    sizes = ("num_hidden_layers", "hidden_size", "image_size", "patch_size")
    lacking = [name for name in sizes if not isinstance(getattr(config, name, None), int)]
    if lacking:
        raise PumiceError(
            f"model_type {config.model_type!r} cannot be a vision backbone: its config has no "
            f"whole number for {', '.join(lacking)}. Vision transformers with square "
            f"images are allowed, such as clip_vision_model, siglip_vision_model, dinov2 and vit."
        )
    return config


def num_blocks(config: Any, layer: int) -> int:
    """How many blocks must run to have the output of `layer`."""
    total: int = config.num_hidden_layers
    blocks = layer if layer >= 0 else total + 1 + layer
    if not 1 <= blocks <= total:
        raise PumiceError(
            f"vision_layer is {layer}, and this {config.model_type} has {total} blocks; allowed: "
            f"1 to {total}, or -1 (the last) to -{total}."
        )
    return blocks


def read_image_stats(folder: Path | str) -> tuple[int, Triple, Triple]:
    """Image side, mean and std of a backbone's folder.

    From preprocessor_config.json; what it does not say comes from config.json (the side) and CLIP.
    """
    path = Path(folder) / "preprocessor_config.json"
    data = read_json(path) if path.is_file() else {}
    size = data.get("crop_size") or data.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not isinstance(size, int):
        size = vision_part(read_config(folder, part="vision backbone")).image_size
    mean, std = data.get("image_mean") or CLIP_MEAN, data.get("image_std") or CLIP_STD
    return size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _cut_config(config: Any, layer: int) -> Any:
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = num_blocks(config, layer)
    # SigLIP's pooling head; its weights would otherwise be asked for and then thrown away.
    if hasattr(cut, "vision_use_head"):
        cut.vision_use_head = False
    return cut


def _new_model(config: Any, attention: str | None, init: bool) -> nn.Module:
    with without_init(not init):
        model: nn.Module = AutoModel.from_config(
            config, dtype=torch.float32, attn_implementation=attention or default_attention()
        )
    return model


def _end_pieces(model: nn.Module, blocks: int) -> tuple[str, ...]:
    # What is registered after the blocks (final norm, pooler, head) would alter the block's output.
    children = list(model.named_children())
    holders = [i for i, (_, child) in enumerate(children) if _holds_blocks(child, blocks)]
    if not holders:
        raise PumiceError(
            f"no list of {blocks} blocks was found in {type(model).__name__}, so it cannot be a "
            f"vision backbone; vision transformers of transformers are allowed."
        )
    return tuple(name for name, _ in children[holders[0] + 1 :])


def _holds_blocks(module: nn.Module, blocks: int) -> bool:
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList))
    return any(len(entries) == blocks for entries in lists)
