"""transformers' LLaVA-1.5 and LLaVA-NeXT folders, opened under our names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pumice.convert.chat_template import choose_template
from pumice.convert.image_files import image_spec
from pumice.convert.keymap import find_hf_layout
from pumice.convert.opened import Facts, Opened, Options, arranged, stored_tokenizer_model
from pumice.core.errors import PumiceError
from pumice.models.config import LMMConfig
from pumice.models.pretrained import config_to_dict, read_config
from pumice.models.tensor_files import RenamedTensors, TensorFiles
from pumice.models.tiling import TilingSpec
from pumice.models.vision import Select
from pumice.processing.processor import Processor
from pumice.processing.sentencepiece_tokenizer import read_tokenizer

PLAIN, NEXT = "llava", "llava_next"
_HEAD = "language.model.lm_head.weight"


def detect(facts: Facts) -> bool:
    """Whether this is transformers' LLaVA-1.5 or LLaVA-NeXT: its config nests those of its parts.

    Original LLaVA's config has the same model_type, and its language model's sizes at the top.
    """
    nested = "vision_config" in facts.config or "text_config" in facts.config
    return facts.config.get("model_type") in (PLAIN, NEXT) and nested


def read(facts: Facts, options: Options) -> Opened:
    """The model of a transformers LLaVA folder, whichever names its tensors have."""
    directory = facts.directory
    config = read_config(directory, part="LLaVA model")
    files = TensorFiles.of_folder(directory)
    layout = find_hf_layout(files)
    tensors = RenamedTensors(files, layout.read(files))
    lmm_config = _lmm_config(config, tensors, directory)
    return arranged(
        Opened(
            layout.layout,
            directory,
            lmm_config,
            hf_processor(directory, lmm_config, options.template),
            tensors,
            tokenizer_model=stored_tokenizer_model(directory),
        )
    )


def hf_processor(directory: Path, config: LMMConfig, template: str | None) -> Processor:
    """The processor of a transformers folder whose model is `config`."""
    tokenizer = read_tokenizer(directory)
    tiling = TilingSpec.from_dict(config.tiling) if config.tiling else None
    spec = image_spec(directory, config.vision["image_size"], tiling)
    chosen, system = choose_template(directory, tokenizer, template, "vicuna_v1")
    tokens, side = view_tokens(config)
    return Processor(tokenizer, spec, chosen, system, tokens, view_side=side)


def view_tokens(config: LMMConfig) -> tuple[int, int | None]:
    """Q, the tokens of one view under a per-patch connector, and the side of their square."""
    side = config.vision["image_size"] // config.vision["patch_size"]
    if config.vision_select == "patch":
        return side**2, side
    # The class token stands before the square; no other prefix comes with cls_patch in LLaVA.
    return side**2 + 1, None


def _lmm_config(config: Any, tensors: Mapping[str, torch.Tensor], directory: Path) -> LMMConfig:
    _check(config, directory)
    language = config_to_dict(config.text_config)
    # Whether head and embedding are one is the whole model's setting there; files that hold no
    # head and say nothing at the top were tied by their language model's config.
    tied = config.tie_word_embeddings or (
        language["tie_word_embeddings"] and _HEAD not in set(tensors)
    )
    return LMMConfig(
        vision=config_to_dict(config.vision_config),
        vision_layer=config.vision_feature_layer,
        vision_select=_select(config, directory),
        connector="mlp2x_gelu",
        tiling=_tiling(config),
        language=language | {"tie_word_embeddings": tied},
    )


def _check(config: Any, directory: Path) -> None:
    layer = config.vision_feature_layer
    refused = (
        (not isinstance(layer, int), f"vision_feature_layer {layer} (several layers at once)"),
        (config.projector_hidden_act != "gelu",
         f"projector_hidden_act {config.projector_hidden_act!r} (gelu is supported)"),
        (not config.multimodal_projector_bias, "a connector without biases"),
        (config.model_type == NEXT and not getattr(config, "use_image_newline_parameter", True),
         "tiles without image_newline"),
    )  # fmt: skip
    wrong = [what for holds, what in refused if holds]
    if wrong:
        raise PumiceError(
            f"{directory} cannot be opened: {' and '.join(wrong)}. pumice's mlp2x_gelu connector "
            f"reads one layer through two linear layers with biases and GELU between."
        )


def _select(config: Any, directory: Path) -> Select:
    strategy = config.vision_feature_select_strategy
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    if strategy == "default" and has_class_token:
        return "patch"
    if strategy == "full":
        # A SigLIP has nothing but patches.
        return "cls_patch" if has_class_token else "patch"
    raise PumiceError(
        f"{directory} has vision_feature_select_strategy {strategy!r} with a "
        f"{config.vision_config.model_type}: 'default' drops the first feature, which must be a "
        f"class token (clip_vision_model). Use 'full' for backbones without one."
    )


def _tiling(config: Any) -> dict[str, Any] | None:
    if config.model_type != NEXT:
        return None
    tile = config.vision_config.image_size
    return TilingSpec.from_pinpoints(config.image_grid_pinpoints, tile).to_dict()
