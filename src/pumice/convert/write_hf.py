"""Writes transformers' LLaVA folders: the published names, and every file a processor needs.

This is the road to transformers and vLLM, which read the names that llava-hf published and
not the ones transformers itself writes since 5.6.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pumice.convert.image_files import image_settings
from pumice.convert.keymap import HF_PUBLISHED
from pumice.convert.opened import Opened, unused_vision_shapes
from pumice.convert.parity import probe_image
from pumice.convert.shards import write_shards
from pumice.core.errors import PumiceError
from pumice.core.files import write_atomic, write_json
from pumice.core.types import assistant, user
from pumice.models.config import LMMConfig
from pumice.models.constants import IMAGE_ID
from pumice.models.tensor_files import ChangedTensors, JoinedTensors, RenamedTensors
from pumice.models.tiling import TilingSpec
from pumice.processing.jinja import to_jinja

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pumice.processing.processor import Processor

IMAGE, PAD = "<image>", "<pad>"
_TABLES = ("language.model.model.embed_tokens.weight", "language.model.lm_head.weight")
# llava-hf's own padding of the vocabulary.
_ROUND = 64
_INSIDE = (IMAGE_ID, IMAGE_ID)
_VISIONS = ("clip_vision_model", "siglip_vision_model")


def write_hf(
    opened: Opened, dst: Path, dtype: torch.dtype | None, shard_bytes: int
) -> dict[str, Any]:
    """Writes `opened` as a transformers LLaVA into the empty directory `dst`.

    Says which tokens were added and how many unused vision tensors had to be made up (as zeros),
    since the format stores the blocks behind the one it uses. Raises for what it cannot express.
    """
    check_design(opened.config)
    images = image_settings(opened.processor.image_spec)
    tokenizer, image_id, pad_id = _tokenizer(opened)
    rows = _rows(opened.config, tokenizer)
    tensors, made_up = _tensors(opened, rows)
    stored = dtype or opened.dtype
    write_json(dst / "config.json", _config(opened.config, rows, image_id, pad_id, stored))
    write_json(dst / "generation_config.json", _generation(opened, pad_id))
    write_json(dst / "preprocessor_config.json", images | {"processor_class": _class(opened)})
    write_json(dst / "processor_config.json", _processor(opened))
    notes = _write_tokenizer(tokenizer, opened, dst)
    write_shards(dst, tensors, dtype=dtype, shard_bytes=shard_bytes)
    return {
        "vocabulary": rows,
        "image_token_id": image_id,
        "made_up_vision_tensors": made_up,
        "notes": notes,
    }


def check_design(config: LMMConfig) -> None:
    """Raises PumiceError with every part that transformers' LLaVA cannot express."""
    kind = config.vision.get("model_type", "a pair of backbones")
    refused = (
        (config.connector != "mlp2x_gelu", f"the connector {config.connector}"),
        (kind not in _VISIONS, f"the vision backbone {kind}"),
        ("input_side" in config.vision, "pictures of another side than the backbone's own"),
        (config.vision_norm, "the vision backbone's final norm (vision_norm)"),
        (not has_plain_names(config), f"the language model {config.language['model_type']}"),
        (config.tiling is not None and not is_next(config), "tiling other than LLaVA-NeXT's"),
        (config.tiling is not None and config.vision_select != "patch", "tiles of cls_patch"),
    )
    wrong = [what for holds, what in refused if holds]
    if wrong:
        raise PumiceError(
            f"transformers' LLaVA cannot express {', '.join(wrong)}. It has a "
            f"{' or '.join(_VISIONS)}, the connector mlp2x_gelu, and one view an image or "
            f"LLaVA-NeXT's tiles. Use --to pumice."
        )


def has_plain_names(config: LMMConfig) -> bool:
    """Whether the decoder keeps its blocks under `model.` beside `lm_head`, as Llama does."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.language["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    from pumice.models.pretrained import config_from_dict

    data = config_from_dict(config.language, part="language model")
    return bool(AutoModelForCausalLM._model_mapping[type(data)].base_model_prefix == "model")


def is_next(config: LMMConfig) -> bool:
    """Whether pictures are tiled as LLaVA-NeXT does it."""
    tiling = config.tiling or {}
    return bool(
        tiling.get("scheme") == "next" and tiling["global_view"] and tiling["keep"] == "floor"
    )


def _class(opened: Opened) -> str:
    return "LlavaNextProcessor" if opened.config.tiling else "LlavaProcessor"


def _tokenizer(opened: Opened) -> tuple[PreTrainedTokenizerFast, int, int]:
    """A copy of the tokenizer that has an image token and a padding token, and their ids."""
    from transformers import AddedToken

    tokenizer = copy.deepcopy(opened.processor.tokenizer)
    vocab = tokenizer.get_vocab()
    names = [IMAGE] if tokenizer.pad_token is not None else [IMAGE, PAD]
    fresh = [AddedToken(n, special=True, normalized=False) for n in names if n not in vocab]
    tokenizer.add_special_tokens({"additional_special_tokens": fresh})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD
    image_id, pad_id = tokenizer.convert_tokens_to_ids([IMAGE, tokenizer.pad_token])
    return tokenizer, int(image_id), int(pad_id)


def _rows(config: LMMConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """The rows of the vocabulary's tables: as they are if every token has one."""
    needed = max(tokenizer.get_vocab().values()) + 1
    held: int = config.language["vocab_size"]
    return held if needed <= held else -(-needed // _ROUND) * _ROUND


def _tensors(opened: Opened, rows: int) -> tuple[Mapping[str, torch.Tensor], int]:
    spare = unused_vision_shapes(opened.config)
    lacking = {name: shape for name, shape in spare.items() if name not in opened.spare}
    kind = opened.dtype
    zeros = {name: torch.zeros(shape, dtype=kind) for name, shape in lacking.items()}
    joined = JoinedTensors(opened.tensors, opened.spare, zeros)
    grown = ChangedTensors(joined, dict.fromkeys(_TABLES, lambda table: with_rows(table, rows)))
    names = {HF_PUBLISHED.theirs(name): name for name in grown}
    return RenamedTensors(grown, dict(sorted(names.items()))), len(lacking)


def with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """float[V, D] -> float[rows, D]; new rows are the mean, whose logit is never the highest."""
    if len(table) >= rows:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def _config(
    config: LMMConfig, rows: int, image_id: int, pad_id: int, dtype: torch.dtype
) -> dict[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stored = str(dtype).removeprefix("torch.")
    text = dict(config.language) | {"vocab_size": rows, "dtype": stored}
    text["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]]
    tiled = config.tiling is not None
    name = "LlavaNext" if tiled else "Llava"
    has_class_token = config.vision["model_type"] == "clip_vision_model"
    data: dict[str, Any] = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "llava_next" if tiled else "llava",
        "dtype": stored,
        "ignore_index": -100,
        "image_token_index": image_id,
        "image_seq_length": (config.vision["image_size"] // config.vision["patch_size"]) ** 2,
        "multimodal_projector_bias": True,
        "pad_token_id": pad_id,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings")),
        "vision_config": dict(config.vision),
        "vision_feature_layer": config.vision_layer,
        "vision_feature_select_strategy": _strategy(config, has_class_token),
    }
    if tiled:
        data["image_grid_pinpoints"] = TilingSpec.from_dict(config.tiling or {}).pinpoints()
        data["use_image_newline_parameter"] = True
    return data


def _strategy(config: LMMConfig, has_class_token: bool) -> str:
    return "default" if has_class_token and config.vision_select == "patch" else "full"


def _generation(opened: Opened, pad_id: int) -> dict[str, Any]:
    ends = opened.processor.end_token_ids
    bos = opened.processor.tokenizer.bos_token_id
    data = {"eos_token_id": ends[0] if len(ends) == 1 else list(ends), "pad_token_id": pad_id}
    return data if bos is None else {"bos_token_id": bos, **data}


def _processor(opened: Opened) -> dict[str, Any]:
    config = opened.config
    has_class_token = config.vision["model_type"] == "clip_vision_model"
    return {
        "image_token": IMAGE,
        "num_additional_image_tokens": int(has_class_token),
        "patch_size": config.vision["patch_size"],
        "processor_class": _class(opened),
        "vision_feature_select_strategy": _strategy(config, has_class_token),
    }


def _write_tokenizer(tokenizer: PreTrainedTokenizerFast, opened: Opened, dst: Path) -> list[str]:
    """Writes the tokenizer's files with the chat template; notes on what it cannot do."""
    tokenizer.chat_template, notes = _chat_template(tokenizer, opened.processor)
    tokenizer.save_pretrained(dst)
    path = dst / "tokenizer_config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    # The one name of this class that every release of transformers knows.
    data |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    data |= {"image_token": IMAGE, "extra_special_tokens": {"image_token": IMAGE}}
    data["processor_class"] = _class(opened)
    for told in ("is_local", "local_files_only"):
        data.pop(told, None)  # how it was loaded here
    write_json(path, data)
    # Older readers look here for it.
    write_json(dst / "chat_template.json", {"chat_template": tokenizer.chat_template})
    if opened.tokenizer_model is not None:
        write_atomic(dst / "tokenizer.model", opened.tokenizer_model.read_bytes())
    return notes


def _chat_template(
    tokenizer: PreTrainedTokenizerFast, processor: Processor
) -> tuple[str, list[str]]:
    """The chat template by which transformers reads a dialogue as the tokens that were learnt.

    Llama's newer tokenizers (Vicuna's) begin a text with a space mark and set none behind a
    special token. LLaVA reads the text behind BOS and behind an image as a text of its own, so
    there the space is written out.
    """
    sources = [
        # A chat message has no line break between an image and its text; LLaVA learnt with one.
        to_jinja(processor.template, processor.system, image_token=f"{IMAGE}{mark}\n", mark=mark)
        for mark in ("", " ")
    ]
    for source in sources:
        if _reads_as_learnt(source, tokenizer, processor):
            return source, []
    return sources[0], [
        "transformers reads prompts of this chat template as other tokens than were learnt: the "
        "tokenizer marks the start of a text otherwise"
    ]


def _reads_as_learnt(source: str, tokenizer: PreTrainedTokenizerFast, processor: Processor) -> bool:
    """Whether a dialogue of two rounds with an image becomes the same ids in both ways."""
    asked, said, more = "What is in this picture?", "A square.", "Which colour has it?"
    image: dict[str, str] = {"type": "image"}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [image, {"type": "text", "text": asked}]},
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
        {"role": "user", "content": [{"type": "text", "text": more}]},
    ]
    found = tokenizer.apply_chat_template(
        chat, chat_template=source, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    turns = [user(asked, probe_image()), assistant(said), user(more)]
    learnt = processor.encode_prompt(turns, pixels=False).input_ids
    # transformers puts as many in place of an image's one token only later.
    ids = [n for n, before in zip(learnt, [0, *learnt], strict=False) if (n, before) != _INSIDE]
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    return [image_id if n == IMAGE_ID else n for n in ids] == list(found)
