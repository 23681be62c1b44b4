"""Any Hugging Face vision transformer as a vision backbone that stops at the layer it needs.

Shapes: N images or tiles, H = W image side, P patch features, Dv vision width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import AutoModel

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.models.constants import CLIP_MEAN as CLIP_MEAN
from pumice.models.constants import CLIP_STD as CLIP_STD
from pumice.models.constants import Triple as Triple
from pumice.models.feature_cache import FeatureCache, encode_cached, weights_digest
from pumice.models.pretrained import (
    config_from_dict,
    config_to_dict,
    default_attention,
    load_pretrained,
    read_config,
    without_init,
)
from pumice.models.vision_classes import register_vision_classes

if TYPE_CHECKING:
    from pumice.models.vision_pair import VisionPair

Select = Literal["patch", "cls_patch"]
# In `config_data`, where pictures come in with another side than the Hugging Face config's.
SIDE = "input_side"


class VisionBackbone(nn.Module):
    """`float[N, 3, H, W] -> float[N, P, Dv]`: the output of block `layer`.

    `layer` counts as in transformers' hidden_states: 1 is the first block's output, -1 the last's,
    -2 (LLaVA) the one before. Later blocks and the end pieces are neither run nor stored; `norm`
    keeps one of them, the final norm, and applies it (InstructBLIP). `image_size` is the side of
    the pictures that come in: by default the config's, else positions are interpolated as the
    model's own code does it.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        select: Select,
        *,
        norm: bool = False,
        image_size: int | None = None,
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
        probe = _probe(config, image_size or config.image_size)
        if model is None:
            model = _new_model(_cut_config(config, layer), attention, init)
        self._outer_norm = _keep_norm(config, probe) if norm else None
        for name in _spare_pieces(model, num_blocks(config, layer), norm):
            setattr(model, name, nn.Identity())
        self.model = model
        self.config = config
        self.layer = layer
        self.select = select
        self.norm = norm
        self.hidden_size: int = config.hidden_size
        self.image_size: int = image_size or config.image_size
        self.patch_size: int = config.patch_size
        self.num_patches: int = (self.image_size // self.patch_size) ** 2
        self.num_prefix_tokens: int = probe.prefix
        self._options = probe.options
        self._cache: FeatureCache | None = None
        self._weights = ""
        if select == "cls_patch" and self.num_prefix_tokens == 0:
            raise PumiceError(
                f"vision_select cls_patch needs a class token, and a {config.model_type} has none; "
                f"use patch."
            )

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        layer: int,
        select: Select,
        norm: bool = False,
        attention: str | None = None,
        init: bool = True,
    ) -> VisionBackbone | VisionPair:
        """The backbone, or the fused pair, whose `config_data` is `config`.

        `init=False` leaves the weights to be filled in.
        """
        from pumice.models.vision_pair import VisionPair

        if "pair" in config:
            return VisionPair.build(config, layer, select, norm, attention, init)
        data = dict(config)
        side = data.pop(SIDE, None)
        return cls(
            config_from_dict(data, part="vision backbone"),
            layer,
            select,
            norm=norm,
            image_size=side,
            attention=attention,
            init=init,
        )

    @classmethod
    def from_folder(
        cls,
        path: Path | str | Sequence[Path | str],
        layer: int,
        select: Select,
        *,
        norm: bool = False,
        image_size: int | None = None,
        attention: str | None = None,
    ) -> VisionBackbone | VisionPair:
        """The vision backbone of a Hugging Face folder (of a whole CLIP: its vision half).

        Two folders give a fused pair. Without `image_size` the backbone reads pictures of the side
        the folder's preprocessing makes.
        """
        from pumice.models.vision_pair import VisionPair

        if not isinstance(path, Path | str):
            return VisionPair.from_folders(path, layer, select, norm=norm, attention=attention)
        register_vision_classes()
        config = vision_part(read_config(path, part="vision backbone"))
        blocks = num_blocks(config, layer)
        model = load_pretrained(
            AutoModel,
            Path(path),
            _cut_config(config, layer),
            attention,
            part="vision backbone",
            spare=lambda model: _spare_pieces(model, blocks, norm),
        )
        side = image_size or read_image_stats(path)[0]
        return cls(config, layer, select, norm=norm, image_size=side, model=model)

    @property
    def config_data(self) -> dict[str, Any]:
        """What `build` reads: the Hugging Face config, and the side of the pictures if another."""
        other = {} if self.image_size == self.config.image_size else {SIDE: self.image_size}
        return config_to_dict(self.config) | other

    @property
    def num_tokens(self) -> int:
        """P, the features that come out for one image."""
        return self.num_patches + (self.num_prefix_tokens if self.select == "cls_patch" else 0)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[N, 3, H, W] -> float[N, P, Dv]; no graph is kept when every weight is frozen."""
        learns = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            if self._cache is None:
                return self._encode(pixel_values)
            if learns or self.training:
                raise PumiceError(_CHANGES)
            return encode_cached(self._encode, pixel_values, self._cache, self._setting())

    def use_cache(self, cache: FeatureCache | None) -> None:
        """Keep features in `cache` and take them from there; None computes them again each time.

        The weights are read once, here: a backbone that changes afterwards needs a new call.
        """
        self._weights = weights_digest(self.model) if cache is not None else ""
        self._cache = cache

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model(pixel_values, **self._options).last_hidden_state
        if self._outer_norm is not None:
            features = self.model.get_submodule(self._outer_norm)(features)
        return features[:, self.num_prefix_tokens :] if self.select == "patch" else features

    def _setting(self) -> dict[str, Any]:
        """Everything of this backbone that decides which features a picture gets."""
        return {
            "weights": self._weights,
            "config": config_to_dict(self.config),
            "layer": num_blocks(self.config, self.layer),
            "select": self.select,
            "norm": self.norm,
            "image_size": self.image_size,
            "dtype": str(next(self.parameters()).dtype),
            "attention": getattr(self.model.config, "_attn_implementation", None),
        }


_CHANGES = (
    "image features are taken from a cache, but the vision backbone is being trained or is in "
    "training mode; cached features belong to fixed weights. Freeze it and call eval(), or leave "
    "the feature cache out."
)


@dataclass(frozen=True, slots=True)
class _Probe:
    """What one block of a family on the meta device tells: nothing is computed or stored."""

    prefix: int
    norm: str | None
    norm_inside: bool
    """Whether the family's own forward applies the norm to what it returns (CLIP's does not)."""
    options: dict[str, Any]
    """What forward must be told to read pictures of another side than the config's."""


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


def read_image_stats(
    folder: Path | str | Sequence[Path | str],
) -> tuple[int, Triple, Triple]:
    """Image side, mean and std of a backbone's folder; of a pair those of the first.

    From preprocessor_config.json; what it does not say comes from config.json (the side) and CLIP.
    """
    if not isinstance(folder, Path | str):
        folder = folder[0]
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
    register_vision_classes()
    with without_init(not init):
        model: nn.Module = AutoModel.from_config(
            config, dtype=torch.float32, attn_implementation=attention or default_attention()
        )
    return model


def _probe(config: Any, side: int) -> _Probe:
    with torch.device("meta"):
        model = _new_model(_cut_config(config, 1), "eager", init=False)
    norm = next((n for n in _end_pieces(model, 1) if "norm" in n), None)
    outputs: list[torch.Tensor] = []
    if norm is not None:
        hook = model.get_submodule(norm).register_forward_hook(
            lambda module, given, output: outputs.append(output)
        )
    last = _blank_run(model, config.image_size, {})
    if norm is not None:
        hook.remove()
    prefix = last.shape[1] - (config.image_size // config.patch_size) ** 2
    options = _side_options(model, config, side, prefix)
    return _Probe(prefix, norm, any(last is output for output in outputs), options)


def _side_options(model: nn.Module, config: Any, side: int, prefix: int) -> dict[str, Any]:
    if side == config.image_size:
        return {}
    name = "interpolate_pos_encoding"  # DINOv2 has no such option and always interpolates
    options = {name: True} if name in inspect.signature(model.forward).parameters else {}
    tokens = prefix + (side // config.patch_size) ** 2
    try:
        found = _blank_run(model, side, options).shape[1]
        says = f"it gives {found} features instead of {tokens}"
    except (ValueError, RuntimeError) as error:
        found, says = None, str(error)
    if found != tokens:
        own = (config.image_size // config.patch_size) ** 2
        raise PumiceError(
            f"a {config.model_type} made for pictures of {config.image_size} pixels ({own} "
            f"patches) cannot read pictures of {side} ({tokens - prefix} patches): {says}. Use "
            f"{config.image_size}, or a family that interpolates its positions, such as dinov2."
        )
    return options


def _blank_run(model: nn.Module, side: int, options: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        blank = torch.zeros(1, 3, side, side, device="meta")
        features: torch.Tensor = model(blank, **options).last_hidden_state
    return features


def _keep_norm(config: Any, probe: _Probe) -> str | None:
    """The name of a norm that must be applied here, since the model's own forward does not."""
    if probe.norm is None:
        raise PumiceError(
            f"vision_norm asks for the final norm, and a {config.model_type} has none after its "
            f"blocks; leave vision_norm out."
        )
    return None if probe.norm_inside else probe.norm


def _spare_pieces(model: nn.Module, blocks: int, norm: bool) -> tuple[str, ...]:
    pieces = _end_pieces(model, blocks)
    kept = next((name for name in pieces if "norm" in name), None) if norm else None
    return tuple(name for name in pieces if name != kept)


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
