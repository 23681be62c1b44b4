"""Tiny random LLaVA checkpoints made with transformers' own classes, as other projects save them.

The tokenizer is that of tiny.py with an image token; images are 32 px, patches 8.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

import tiny

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# What llava-hf published, in the form of a template that takes parts.
CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vision_config(kind: str = "clip") -> Any:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": tiny.IMAGE_SIZE,
        "patch_size": tiny.PATCH_SIZE,
    }
    return CLIPVisionConfig(**sizes) if kind == "clip" else SiglipVisionConfig(**sizes)


def text_config(kind: str = "llama", vocab: int = 448, tied: bool = False) -> Any:
    return AutoConfig.for_model(
        kind,
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tiny.tokenizer_folder(folder)
    made = PreTrainedTokenizerFast.from_pretrained(folder)
    names = [AddedToken(n, special=True, normalized=False) for n in ("<image>", "<pad>")]
    made.add_special_tokens({"additional_special_tokens": names})
    made.pad_token = "<pad>"
    return made


def spread(model: torch.nn.Module, seed: int = 3) -> None:
    """Weights wide enough for a wrong name or order to show in every logit."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def llava(
    folder: Path,
    text: str = "llama",
    vision: str = "clip",
    tied: bool = False,
    strategy: str | None = None,
) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 as transformers 5 saves it, with the files that llava-hf's folders hold."""
    made = tokenizer(folder)
    config = LlavaConfig(
        text_config=text_config(text, tied=tied),
        vision_config=vision_config(vision),
        image_token_index=made.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy or ("default" if vision == "clip" else "full"),
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config)
    spread(model)
    model.tie_weights()
    model.save_pretrained(folder)
    made.chat_template = CHAT
    made.save_pretrained(folder)
    write_preprocessor(folder, vision)
    return model.eval()


def write_preprocessor(folder: Path, vision: str = "clip", **more: Any) -> None:
    side = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    data: dict[str, Any] = {"image_mean": MEAN, "image_std": STD, "resample": 3}
    if vision == "clip":
        data |= {"crop_size": side, "do_center_crop": True, "size": {"shortest_edge": 32}}
        data |= {"image_processor_type": "CLIPImageProcessor"}
    else:
        data |= {"size": side, "image_processor_type": "SiglipImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(data | more))
    processor = {
        "patch_size": tiny.PATCH_SIZE,
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": 1 if vision == "clip" else 0,
        "vision_feature_select_strategy": "default" if vision == "clip" else "full",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))


def rename(folder: Path, *pairs: tuple[str, str]) -> None:
    """The same weights under other names: the first beginning that fits is replaced."""
    path = folder / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        start = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
        renamed[start[1] + name.removeprefix(start[0])] = tensor
    save_file(renamed, path, metadata={"format": "pt"})


# From what transformers 5 saves to the other layouts that are about.
TO_PUBLISHED = (("vision_tower.", "vision_tower.vision_model."),)
TO_MEMORY = (
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)


def original(
    folder: Path,
    model: LlavaForConditionalGeneration,
    *,
    tower_inside: bool = True,
    pickled: bool = False,
    **more: Any,
) -> Path:
    """The same model as haotian-liu/LLaVA lays it out."""
    tiny.tokenizer_folder(folder)
    config = original_config(model, **more)
    (folder / "config.json").write_text(json.dumps(config))
    state = original_state(model)
    if not tower_inside:
        state = {n: t for n, t in state.items() if not n.startswith("model.vision_tower.")}
    if pickled:
        # Releases of that time stored the rotary table as well.
        frequencies = torch.arange(4.0)
        for block in range(2):
            state[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = frequencies
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def original_config(model: LlavaForConditionalGeneration, **more: Any) -> dict[str, Any]:
    text = model.config.text_config
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps hidden_act"
    ).split()
    return {
        **{key: getattr(text, key) for key in keys},
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "_name_or_path": "somewhere/else",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_length": 4096,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "nobody/a-clip",
        **more,
    }


def original_state(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    pairs = (
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.image_newline", "model.image_newline"),
        ("model.language_model.", "model."),
        ("lm_head.", "lm_head."),
    )
    state = {}
    for name, tensor in model.state_dict().items():
        start, other = next(pair for pair in pairs if name.startswith(pair[0]))
        state[other + name.removeprefix(start)] = tensor.clone().contiguous()
    return state


def clip_folder(folder: Path, model: LlavaForConditionalGeneration) -> Path:
    """The vision backbone of a LLaVA as a CLIP folder of its own, with the older names."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config.vision_config)
    config.save_pretrained(folder)
    state = model.model.vision_tower.state_dict()
    save_file(
        {f"vision_model.{name}": tensor.clone() for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_preprocessor(folder)
    (folder / "processor_config.json").unlink()
    return folder
