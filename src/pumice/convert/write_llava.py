"""Writes the original LLaVA layout (haotian-liu/LLaVA), the vision backbone included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pumice.convert.image_files import image_settings, pads_with_mean
from pumice.convert.keymap import LLAVA
from pumice.convert.llava import DECODERS
from pumice.convert.llava_vision import known_tower
from pumice.convert.opened import Opened, unused_vision_shapes
from pumice.convert.shards import write_shards
from pumice.convert.write_hf import is_next
from pumice.core.errors import PumiceError
from pumice.core.files import write_atomic, write_json
from pumice.models.config import LMMConfig
from pumice.models.tensor_files import JoinedTensors, RenamedTensors
from pumice.models.tiling import TilingSpec

TOWER_FOLDER = "vision_tower"
_EMBEDDING = "language.model.model.embed_tokens.weight"
_HEAD = "language.model.lm_head.weight"
# Of model types with the same decoder the one that its current code registers.
_TYPES = {decoder: kind for kind, decoder in DECODERS.items()}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}


def write_llava(
    opened: Opened, dst: Path, dtype: torch.dtype | None, shard_bytes: int
) -> dict[str, Any]:
    """Writes `opened` as an original LLaVA into the empty directory `dst`.

    The weights hold the vision backbone. A published CLIP is called by its name; of any other the
    folder `vision_tower` holds the config. Raises for what the layout cannot express.
    """
    _check(opened)
    lacking = {
        name: shape
        for name, shape in unused_vision_shapes(opened.config).items()
        if name not in opened.spare
    }
    more = {name: torch.zeros(shape, dtype=opened.dtype) for name, shape in lacking.items()}
    tied = bool(opened.config.language.get("tie_word_embeddings"))
    if tied:
        more[_HEAD] = opened.tensors[_EMBEDDING]
    joined = JoinedTensors(opened.tensors, opened.spare, more)
    names = {LLAVA.theirs(name): name for name in joined}
    tower = known_tower(opened.config.vision)
    if tower is None:
        tower = TOWER_FOLDER
        _write_tower_config(opened, dst / TOWER_FOLDER)
    write_json(dst / "config.json", _config(opened, tower, dtype or opened.dtype))
    opened.processor.tokenizer.save_pretrained(dst)
    if opened.tokenizer_model is not None:
        write_atomic(dst / "tokenizer.model", opened.tokenizer_model.read_bytes())
    tensors = RenamedTensors(joined, dict(sorted(names.items())))
    write_shards(dst, tensors, dtype=dtype, shard_bytes=shard_bytes)
    template = opened.processor.template.name
    notes = [
        f"original LLaVA's files do not name the conversation template: choose {template} there"
    ]
    if tied:
        notes.append(
            "the output head, which shares its weights with the embeddings, is written out"
        )
    return {
        "mm_vision_tower": tower,
        "made_up_vision_tensors": len(lacking),
        "notes": notes,
    }


def _check(opened: Opened) -> None:
    config, spec = opened.config, opened.processor.image_spec
    per_patch = config.connector == "linear" or config.connector.startswith("mlp")
    decoder = config.language["model_type"]
    kind = config.vision.get("model_type", "a pair of backbones")
    refused = (
        (not per_patch, f"the connector {config.connector}"),
        (kind != "clip_vision_model", f"the vision backbone {kind}"),
        ("input_side" in config.vision, "pictures of another side than the backbone's own"),
        (config.vision_norm, "the vision backbone's final norm (vision_norm)"),
        (decoder not in _TYPES, f"the language model {decoder}"),
        (config.tiling is not None and not is_next(config), "tiling other than LLaVA-NeXT's"),
        (spec.mode == "resize", "pictures squeezed to a square"),
        (not pads_with_mean(spec), f"the padding colour {spec.canvas_color}"),
        (spec.resample != "bicubic", f"the resize filter {spec.resample}"),
    )
    wrong = [what for holds, what in refused if holds]
    if wrong:
        raise PumiceError(
            f"original LLaVA cannot express {', '.join(wrong)}. It has a clip_vision_model, the "
            f"connectors linear and mlpNx_gelu, and the decoders {', '.join(_TYPES)}. Use --to "
            f"pumice."
        )


def _config(opened: Opened, tower: str, dtype: torch.dtype) -> dict[str, Any]:
    config = opened.config
    language = dict(config.language)
    decoder = language.pop("model_type")
    rope = dict(language.pop("rope_parameters", None) or {})
    theta = rope.pop("rope_theta", 10000.0)
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    spec = opened.processor.image_spec
    return {
        **language,
        # Its released code never ties; a tied head is written out as the copy it is.
        "tie_word_embeddings": False,
        "architectures": [f"Llava{_CLASSES[decoder]}ForCausalLM"],
        "model_type": _TYPES[decoder],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "mm_hidden_size": config.vision["hidden_size"],
        "mm_projector_type": config.connector,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": config.vision_select,
        "mm_vision_select_layer": config.vision_layer,
        "mm_vision_tower": tower,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad" if spec.mode == "pad" else "square",
        "mm_patch_merge_type": "flat",
        **_tiled(config),
    }


def _tiled(config: LMMConfig) -> dict[str, Any]:
    if config.tiling is None:
        return {}
    pinpoints = TilingSpec.from_dict(config.tiling).pinpoints()
    return {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        # (width, height) there.
        "image_grid_pinpoints": [[width, height] for height, width in pinpoints],
    }


def _write_tower_config(opened: Opened, folder: Path) -> None:
    folder.mkdir()
    data = dict(opened.config.vision)
    write_json(folder / "config.json", data | {"architectures": ["CLIPVisionModel"]})
    # LLaVA pads and tiles before the tower's own preparation sees a picture.
    cropped = replace(opened.processor.image_spec, mode="crop", tiling=None, pad_color=None)
    write_json(folder / "preprocessor_config.json", image_settings(cropped))
