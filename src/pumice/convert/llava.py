"""Original LLaVA checkpoints (haotian-liu/LLaVA): whole, a connector alone, or a LoRA.

Whole ones may lack the vision backbone, which is then read from the folder they name. A connector
(`mm_projector.bin`) and a LoRA (`non_lora_trainables.bin`) need their base; LoRA is merged into it
or kept beside it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pumice.convert.find_folder import find_folder
from pumice.convert.huggingface import view_tokens
from pumice.convert.keymap import LANGUAGE, LLAVA, is_computed
from pumice.convert.llava_vision import Tower, find_tower
from pumice.convert.opened import Facts, Opened, Options, arranged, stored_tokenizer_model
from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.models.config import LMMConfig
from pumice.models.lora import CONFIG as ADAPTER_CONFIG
from pumice.models.lora import Adapter, MergedTensors, read_adapter
from pumice.models.pretrained import config_to_dict, read_config
from pumice.models.tensor_files import NAMES, JoinedTensors, RenamedTensors, TensorFiles
from pumice.models.tiling import TilingSpec
from pumice.processing.images import ImageSpec
from pumice.processing.own_template import find_template
from pumice.processing.processor import Processor
from pumice.processing.sentencepiece_tokenizer import read_tokenizer

PROJECTOR = "mm_projector.bin"
NON_LORA = "non_lora_trainables.bin"
# Its model types -> the decoder inside; "llava" is what the published configs say.
DECODERS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
_TEMPLATES = {"llama": "vicuna_v1", "mistral": "mistral_instruct", "qwen2": "qwen"}
_WRAPPED = "base_model.model."


def detect(facts: Facts) -> bool:
    """Whether this is original LLaVA: a decoder's config with settings that begin with mm_."""
    return any(key.startswith("mm_") for key in facts.config) and "format" not in facts.config


def read(facts: Facts, options: Options) -> Opened:
    """The model of an original LLaVA directory, together with the base it needs."""
    directory, config = facts.directory, facts.config
    _check(config, directory)
    whole = any(name in facts.files for name in NAMES)
    base = None if whole else _base(facts, options)
    own = _own_tensors(facts, whole)
    adapter = None
    if base is not None and ADAPTER_CONFIG in facts.files:
        adapter = read_adapter(directory)
    tower = find_tower(facts, options.vision, [n for n in own if n.startswith("vision.model.")])
    parts: list[Mapping[str, torch.Tensor]] = [tower.tensors, own]
    if base is not None:
        parts = [_base_language(base, adapter, merge=not options.keep_adapter), *parts]
    lmm_config = _lmm_config(config, base, tower, directory)
    home = directory if _has_tokenizer(directory) else base or directory
    return arranged(
        Opened(
            _name(facts, whole),
            directory,
            lmm_config,
            _processor(home, config, lmm_config, tower, options.template),
            JoinedTensors(*parts),
            tower=config.get("mm_vision_tower"),
            tokenizer_model=stored_tokenizer_model(home),
            adapter=adapter if options.keep_adapter else None,
        )
    )


def language_config(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The decoder's Hugging Face config inside an original LLaVA config."""
    from transformers import AutoConfig

    kind = config.get("model_type")
    decoder = DECODERS.get(str(kind))
    if decoder is None:
        raise PumiceError(
            f"{directory} is an original LLaVA of model_type {kind!r}; supported: "
            f"{', '.join(DECODERS)}. MPT's positions cannot be packed or cached as decoders here "
            f"need it; other types are not known."
        )
    known = set(AutoConfig.for_model(decoder).to_dict()) | {"rope_theta", "rope_scaling"}
    leave = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
    data = {k: v for k, v in config.items() if k in known - leave and v is not None}
    return config_to_dict(AutoConfig.for_model(decoder, **data))


def _name(facts: Facts, whole: bool) -> str:
    if whole:
        return "original LLaVA"
    kind = "a LoRA" if ADAPTER_CONFIG in facts.files else "a connector (stage 1)"
    return f"original LLaVA, {kind} and its base"


def _check(config: Mapping[str, Any], directory: Path) -> None:
    refused = (
        (config.get("mm_use_im_start_end"), "mm_use_im_start_end (tokens round every image)"),
        (config.get("s2"), "s2 (several scales at once)"),
        (config.get("mm_resampler_type"), f"mm_resampler_type {config.get('mm_resampler_type')}"),
    )
    wrong = [what for holds, what in refused if holds]
    if wrong:
        raise PumiceError(
            f"{directory} uses {' and '.join(wrong)}, which pumice does not have; checkpoints "
            f"without it can be opened."
        )


def _own_tensors(facts: Facts, whole: bool) -> RenamedTensors:
    """What the directory itself holds, under our names."""
    directory = facts.directory
    if whole:
        files = TensorFiles.of_folder(directory)
        return RenamedTensors(files, LLAVA.read(files))
    name = NON_LORA if ADAPTER_CONFIG in facts.files else PROJECTOR
    if name not in facts.files:
        raise PumiceError(
            f"{directory} has the config of an original LLaVA but no weights: neither "
            f"{', '.join(NAMES)}, nor {PROJECTOR}, nor {NON_LORA} beside an {ADAPTER_CONFIG} "
            f"(found: {', '.join(sorted(facts.files)[:8])}). Copy it again in full."
        )
    files = TensorFiles([directory / name])
    plain = {_unwrapped(name): name for name in files}
    return RenamedTensors(files, {ours: plain[n] for ours, n in LLAVA.read(plain).items()})


def _unwrapped(name: str) -> str:
    """A name without what peft puts before it: `base_model.model.` and the wrapped model's own."""
    return name.removeprefix(_WRAPPED)


def _base(facts: Facts, options: Options) -> Path:
    directory = facts.directory
    name = facts.config.get("_name_or_path")
    if ADAPTER_CONFIG in facts.files:
        name = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path") or name
    if name and Path(name).name == directory.name:
        name = None  # an original LLaVA names itself
    return find_folder(directory, name, options.base, part="base language model", option="base")


def _base_language(
    base: Path, adapter: Adapter | None, *, merge: bool
) -> Mapping[str, torch.Tensor]:
    """The base's language model under our names; an adapter must fit it, and may be merged in."""
    files = TensorFiles.of_folder(base)
    # The base of a LoRA may be a whole LLaVA, of which the decoder is wanted.
    names = {name: name for name in files if _of_decoder(name) and not is_computed(name)}
    language: Mapping[str, torch.Tensor] = RenamedTensors(files, names)
    if adapter is not None:
        adapter.check_base(language)
        if merge:
            language = MergedTensors(language, adapter)
    return RenamedTensors(language, LANGUAGE.read(language))


def _of_decoder(name: str) -> bool:
    return LLAVA.fits([name]) and LLAVA.ours(name).startswith("language.")


def _lmm_config(
    config: Mapping[str, Any], base: Path | None, tower: Tower, directory: Path
) -> LMMConfig:
    connector = config.get("mm_projector_type") or "linear"
    if connector == "identity" or "res" in connector:
        raise PumiceError(
            f"{directory} has mm_projector_type {connector!r}; linear and mlpNx_gelu (such as "
            f"mlp2x_gelu) can be opened."
        )
    return LMMConfig(
        vision=tower.config,
        vision_layer=config.get("mm_vision_select_layer", -2),
        vision_select=config.get("mm_vision_select_feature", "patch"),
        connector=connector,
        tiling=_tiling(config, tower.config["image_size"], directory),
        language=language_config(config, directory) if base is None else _base_config(base),
    )


def _base_config(base: Path) -> dict[str, Any]:
    data = read_json(base / "config.json")
    if any(key.startswith("mm_") for key in data):
        return language_config(data, base)
    return config_to_dict(read_config(base, part="base language model"))


def _tiling(config: Mapping[str, Any], tile: int, directory: Path) -> dict[str, Any] | None:
    aspect = config.get("image_aspect_ratio")
    merge = config.get("mm_patch_merge_type", "flat")
    if aspect in (None, "square", "pad") and merge in ("flat", None):
        return None
    if aspect != "anyres" or merge != "spatial_unpad":
        raise PumiceError(
            f"{directory} has image_aspect_ratio {aspect!r} with mm_patch_merge_type {merge!r}; "
            f"supported: square and pad with flat, and anyres with spatial_unpad."
        )
    pinpoints = config.get("image_grid_pinpoints")
    if isinstance(pinpoints, str):
        pinpoints = ast.literal_eval(pinpoints)
    # (width, height) there; transformers and `from_pinpoints` have (height, width).
    swapped = [(height, width) for width, height in pinpoints or ()]
    return TilingSpec.from_pinpoints(swapped, tile).to_dict()


def _processor(
    home: Path,
    config: Mapping[str, Any],
    lmm_config: LMMConfig,
    tower: Tower,
    wanted: str | None,
) -> Processor:
    tokenizer = read_tokenizer(home)
    decoder = lmm_config.language["model_type"]
    default = _TEMPLATES.get(decoder, "vicuna_v1")
    if decoder == "llama" and _knows(tokenizer.get_vocab(), ("<|im_start|>", "<|im_end|>")):
        default = "chatml_direct"
    # A chat template in such a folder is the base model's; LLaVA's own are not written down there.
    template = find_template(wanted or default, tokenizer)
    tiling = TilingSpec.from_dict(lmm_config.tiling) if lmm_config.tiling else None
    spec = ImageSpec(
        "pad" if config.get("image_aspect_ratio") == "pad" else "crop",
        tower.config["image_size"],
        tower.mean,
        tower.std,
        tiling=tiling,
        transparency="ignored",
    )
    tokens, side = view_tokens(lmm_config)
    return Processor(tokenizer, spec, template, None, tokens, view_side=side)


def _knows(vocab: Mapping[str, int], tokens: Iterable[str]) -> bool:
    return all(token in vocab for token in tokens)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
