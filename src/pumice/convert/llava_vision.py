"""The vision backbone of an original LLaVA, which its checkpoint may hold, or only name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pumice.convert.find_folder import find_folder
from pumice.convert.keymap import VISION_BARE, VISION_WHOLE, is_computed
from pumice.convert.opened import Facts
from pumice.core.errors import PumiceError
from pumice.models.pretrained import config_to_dict, read_config
from pumice.models.tensor_files import RenamedTensors, TensorFiles
from pumice.models.vision import CLIP_MEAN, CLIP_STD, Triple, read_image_stats, vision_part

_LAYERS = re.compile(r"vision\.model\.encoder\.layers\.(\d+)\.layer_norm1\.weight")
# (width, blocks, patch, side, MLP width) of the published ones, heads of 64 and quick_gelu in all.
_OPENAI = {
    "openai/clip-vit-base-patch32": (768, 12, 32, 224, 3072),
    "openai/clip-vit-base-patch16": (768, 12, 16, 224, 3072),
    "openai/clip-vit-large-patch14": (1024, 24, 14, 224, 4096),
    "openai/clip-vit-large-patch14-336": (1024, 24, 14, 336, 4096),
}


@dataclass(frozen=True)
class Tower:
    """A vision backbone: its Hugging Face config, how pictures are normalised, and its tensors."""

    config: dict[str, Any]
    mean: Triple
    std: Triple
    tensors: Mapping[str, torch.Tensor]
    """Under our names; empty when the checkpoint itself holds them."""


def find_tower(facts: Facts, given: Path | None, inside: Sequence[str]) -> Tower:
    """The vision backbone an original LLaVA uses; `inside` are its tensors in the checkpoint.

    The checkpoint never says the backbone's sizes; they come from the folder it names, or are
    those of a published CLIP.
    """
    name = facts.config.get("mm_vision_tower") or facts.config.get("vision_tower")
    if inside and given is None and name in _OPENAI:
        return Tower(_openai_config(name, inside), CLIP_MEAN, CLIP_STD, {})
    folder = find_folder(facts.directory, name, given, part="vision backbone", option="vision")
    config = config_to_dict(vision_part(read_config(folder, part="vision backbone")))
    _, mean, std = read_image_stats(folder)
    return Tower(config, mean, std, {} if inside else _folder_tensors(folder))


def known_tower(config: Mapping[str, Any]) -> str | None:
    """The published name of the CLIP that has this config; None for any other."""
    if config.get("model_type") != "clip_vision_model" or config.get("hidden_act") != "quick_gelu":
        return None
    sizes = tuple(config.get(key) for key in _SIZES)
    heads = config["hidden_size"] // 64 == config.get("num_attention_heads")
    return next((name for name, own in _OPENAI.items() if heads and own == sizes), None)


_SIZES = ("hidden_size", "num_hidden_layers", "patch_size", "image_size", "intermediate_size")


def _openai_config(name: str, inside: Sequence[str]) -> dict[str, Any]:
    from transformers import CLIPVisionConfig

    values = dict(zip(_SIZES, _OPENAI[name], strict=True))
    blocks = {match[1] for key in inside if (match := _LAYERS.fullmatch(key))}
    if len(blocks) != values["num_hidden_layers"]:
        raise PumiceError(
            f"the checkpoint holds a vision backbone of {len(blocks)} blocks and calls it {name}, "
            f"which has {values['num_hidden_layers']}. Give the right folder with --vision DIR "
            f"(vision= in Python)."
        )
    heads = values["hidden_size"] // 64
    return config_to_dict(CLIPVisionConfig(**values, num_attention_heads=heads, projection_dim=768))


def _folder_tensors(folder: Path) -> RenamedTensors:
    files = TensorFiles.of_folder(folder)
    names = [name for name in files if not is_computed(name)]
    whole = [name for name in names if name.startswith("vision_model.")]
    # All of a CLIP has a half for text as well, and projections.
    return RenamedTensors(files, VISION_WHOLE.read(whole) if whole else VISION_BARE.read(names))
