"""Our tensor names beside llama.cpp's, as tables that are read both ways.

{n} stands for the number of a block. What a name lacks here cannot be written: a tensor left over
on either side is an error of the caller, never skipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pumice.core.errors import PumiceError

Pairs = tuple[tuple[str, str], ...]

_LANGUAGE: Pairs = (
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
)
_HEAD: Pairs = (("lm_head.weight", "output.weight"),)
_LANGUAGE_BLOCK: Pairs = (
    ("model.layers.{n}.input_layernorm.weight", "blk.{n}.attn_norm.weight"),
    ("model.layers.{n}.self_attn.q_proj.weight", "blk.{n}.attn_q.weight"),
    ("model.layers.{n}.self_attn.k_proj.weight", "blk.{n}.attn_k.weight"),
    ("model.layers.{n}.self_attn.v_proj.weight", "blk.{n}.attn_v.weight"),
    ("model.layers.{n}.self_attn.o_proj.weight", "blk.{n}.attn_output.weight"),
    ("model.layers.{n}.post_attention_layernorm.weight", "blk.{n}.ffn_norm.weight"),
    ("model.layers.{n}.mlp.gate_proj.weight", "blk.{n}.ffn_gate.weight"),
    ("model.layers.{n}.mlp.up_proj.weight", "blk.{n}.ffn_up.weight"),
    ("model.layers.{n}.mlp.down_proj.weight", "blk.{n}.ffn_down.weight"),
)
_QKV_BIASES: Pairs = (
    ("model.layers.{n}.self_attn.q_proj.bias", "blk.{n}.attn_q.bias"),
    ("model.layers.{n}.self_attn.k_proj.bias", "blk.{n}.attn_k.bias"),
    ("model.layers.{n}.self_attn.v_proj.bias", "blk.{n}.attn_v.bias"),
)
_OUT_BIAS: Pairs = (("model.layers.{n}.self_attn.o_proj.bias", "blk.{n}.attn_output.bias"),)

_PATCHES: Pairs = (
    ("embeddings.patch_embedding.weight", "v.patch_embd.weight"),
    ("embeddings.position_embedding.weight", "v.position_embd.weight"),
)
_CLIP: Pairs = (
    ("embeddings.class_embedding", "v.class_embd"),
    # transformers keeps the spelling of the first CLIP release.
    ("pre_layrnorm.weight", "v.pre_ln.weight"),
    ("pre_layrnorm.bias", "v.pre_ln.bias"),
)
_SIGLIP: Pairs = (("embeddings.patch_embedding.bias", "v.patch_embd.bias"),)
_VISION_BLOCK: tuple[tuple[str, str], ...] = (
    ("layer_norm1", "ln1"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.out_proj", "attn_out"),
    ("layer_norm2", "ln2"),
    ("mlp.fc1", "ffn_up"),
    ("mlp.fc2", "ffn_down"),
)
_CONNECTOR: Pairs = (
    ("connector.0.weight", "mm.0.weight"),
    ("connector.0.bias", "mm.0.bias"),
    ("connector.2.weight", "mm.2.weight"),
    ("connector.2.bias", "mm.2.bias"),
)


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls a family of language models, and in which order it wants rotary rows."""

    arch: str
    neighbours: bool


# Mistral is a Llama to llama.cpp; its sliding window, if any, is handled where metadata is made.
LANGUAGES = {
    "llama": Family("llama", neighbours=True),
    "mistral": Family("llama", neighbours=True),
    "qwen2": Family("qwen2", neighbours=False),
}
VISIONS = {"clip_vision_model": _CLIP, "siglip_vision_model": _SIGLIP}


def language_names(config: dict[str, Any]) -> dict[str, str]:
    """Every tensor of this language model: our name -> llama.cpp's, in the order of the file."""
    pairs = _LANGUAGE if config.get("tie_word_embeddings") else _LANGUAGE + _HEAD
    block = _LANGUAGE_BLOCK
    if config["model_type"] == "qwen2":
        block += _QKV_BIASES
    elif config.get("attention_bias"):
        block += _QKV_BIASES + _OUT_BIAS
    pairs += _numbered(block, config["num_hidden_layers"])
    return {f"language.model.{ours}": theirs for ours, theirs in pairs}


def vision_names(config: dict[str, Any], blocks: int) -> dict[str, str]:
    """Every tensor of vision backbone and connector: our name -> llama.cpp's.

    `blocks` are those up to the layer in use. Where the MLP is as narrow as the backbone, fc1 and
    fc2 change names: llama.cpp takes equal widths for the swapped names of old files and swaps them
    back (clip.cpp, `is_ffn_swapped`).
    """
    swapped = config["intermediate_size"] == config["hidden_size"]
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"} if swapped else {}
    block = tuple(
        (f"encoder.layers.{{n}}.{ours}.{kind}", f"v.blk.{{n}}.{other.get(theirs, theirs)}.{kind}")
        for ours, theirs in _VISION_BLOCK
        for kind in ("weight", "bias")
    )
    pairs = _PATCHES + VISIONS[config["model_type"]] + _numbered(block, blocks)
    names = {f"vision.model.{ours}": theirs for ours, theirs in pairs}
    return {**names, **dict(_CONNECTOR)}


def check_complete(names: Iterable[str], given: Iterable[str]) -> None:
    """Raises when the model's tensors are not exactly the ones that will be written."""
    wanted, found = set(names), set(given)
    sides = (("missing", wanted - found), ("left over", found - wanted))
    told = [f"{what}: {_some(sorted(rest))}" for what, rest in sides if rest]
    if told:
        raise PumiceError(
            f"the tensors do not fit the model's config, so no GGUF file was written. "
            f"{'; '.join(told)}. Open the checkpoint again, or export it with --to hf."
        )


def _numbered(pairs: Pairs, count: int) -> Pairs:
    return tuple(
        (ours.replace("{n}", str(number)), theirs.replace("{n}", str(number)))
        for number in range(count)
        for ours, theirs in pairs
    )


def _some(names: list[str], limit: int = 8) -> str:
    more = f" (+{len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
