"""Export for llama.cpp: the language model as one GGUF file, vision and connector as another.

llama.cpp computes LLaVA with its "llava" graph (tools/mtmd/models/llava.cpp): a CLIP or SigLIP
backbone, a two-layer MLP, and a Llama or Qwen2 decoder. What it has no graph for is refused here by
name; what it computes slightly otherwise is told in the notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pumice.convert.gguf_file import TYPES, GGUFFile, GGUFType
from pumice.convert.gguf_names import (
    LANGUAGES,
    VISIONS,
    check_complete,
    language_names,
    vision_names,
)
from pumice.convert.gguf_tokenizer import Vocabulary, read_vocabulary, reading_differences
from pumice.convert.rotary import to_neighbours
from pumice.core.errors import PumiceError
from pumice.models.config import LMMConfig
from pumice.models.pretrained import config_from_dict
from pumice.models.vision import num_blocks
from pumice.processing.jinja import to_jinja

if TYPE_CHECKING:
    from pumice.processing.processor import Processor

# The colour clip.cpp pads with for this projector; CLIP's mean colour as 8-bit numbers.
_PAD_COLOR = (122, 116, 104)
_NAME = "LLaVA by pumice"
# Measured (benchmarks/gguf_parity.py); no file can make up for it, since a patch is lost.
_CLASS_TOKEN = (
    "llama.cpp since pull request 13321 (May 2025) puts CLIP's class token behind the patches and "
    "so answers wrongly about images; use a build with pull request 25844 merged"
)


@dataclass(frozen=True)
class GGUFExport:
    """The files written, and in which points llama.cpp's answers may differ from ours."""

    language: Path
    mmproj: Path
    notes: tuple[str, ...]


def write_gguf(
    config: LMMConfig,
    tensors: Mapping[str, torch.Tensor],
    processor: Processor,
    dst: Path | str,
    dtype: GGUFType = "f16",
    *,
    chat_template: str | None = None,
) -> GGUFExport:
    """Writes model-DTYPE.gguf and mmproj-DTYPE.gguf into `dst`; `tensors` are read one by one.

    Quantised kinds hold the language model's matrices; vision and connector are then f16, as
    llama.cpp has it. `chat_template` is Jinja text that replaces the processor's own template. A
    design that llama.cpp has no graph for raises and nothing is written.
    """
    if dtype not in TYPES:
        raise PumiceError(f"GGUF type {dtype!r} is unknown; allowed: {', '.join(TYPES)}.")
    _check_design(config)
    blocks = num_blocks(
        config_from_dict(config.vision, part="vision backbone"), config.vision_layer
    )
    texts = language_names(config.language)
    pictures = vision_names(config.vision, blocks)
    tied = {"language.model.lm_head.weight"} if config.language["tie_word_embeddings"] else set()
    check_complete([*texts, *pictures], set(tensors) - tied)
    dst = Path(dst)
    dst.mkdir(parents=True, exist_ok=True)
    half: GGUFType = dtype if dtype in ("f32", "bf16") else "f16"
    language = GGUFFile(dst / f"model-{dtype}.gguf", LANGUAGES[_family(config)].arch, dtype)
    notes = _language_metadata(language, config.language)
    notes += _vocabulary(language, processor, config.language["vocab_size"], chat_template)
    _add_language(language, config.language, tensors, texts)
    mmproj = GGUFFile(dst / f"mmproj-{half}.gguf", "clip", half)
    notes += _vision_metadata(mmproj, config, processor, blocks)
    _add_vision(mmproj, tensors, pictures)
    language.write()
    mmproj.write()
    return GGUFExport(language.path, mmproj.path, tuple(notes))


def _family(config: LMMConfig) -> str:
    return str(config.language["model_type"])


def _check_design(config: LMMConfig) -> None:
    vision, language = config.vision, config.language
    kind = vision.get("model_type", "a pair of backbones")
    rope = language.get("rope_parameters") or {}
    window = language.get("use_sliding_window")
    refused = (
        (config.tiling is not None, "tiled images"),
        (config.connector != "mlp2x_gelu", f"the connector {config.connector}"),
        (kind not in VISIONS, f"the vision backbone {kind}"),
        (config.vision_select != "patch", f"vision_select {config.vision_select}"),
        (config.vision_norm, "vision_norm"),
        (_family(config) not in LANGUAGES, f"the language model {_family(config)}"),
        (language.get("hidden_act") != "silu", f"the activation {language.get('hidden_act')}"),
        (bool(language.get("mlp_bias")), "biases in the language model's MLP"),
        (bool(window), "sliding windows in some layers"),
        (rope.get("rope_type", "default") not in ("default", "linear", "llama3"),
         f"rotary scaling {rope.get('rope_type')}"),
    )  # fmt: skip
    wrong = [what for holds, what in refused if holds]
    if wrong:
        raise PumiceError(
            f"llama.cpp cannot express {', '.join(wrong)}. GGUF is possible for a "
            f"{' or '.join(VISIONS)} with select patch, the connector mlp2x_gelu, one view an "
            f"image, and a language model of {', '.join(LANGUAGES)}. Use --to hf or --to pumice."
        )


def _language_metadata(file: GGUFFile, config: dict[str, Any]) -> list[str]:
    meta, notes = file.meta, []
    rope = config["rope_parameters"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    context = config["max_position_embeddings"]
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    if window and window < context:
        notes.append(f"the sliding window of {window} becomes the longest context")
        context = window
    meta.add_name(_NAME)
    meta.add_vocab_size(config["vocab_size"])
    meta.add_context_length(context)
    meta.add_embedding_length(config["hidden_size"])
    meta.add_block_count(config["num_hidden_layers"])
    meta.add_feed_forward_length(config["intermediate_size"])
    meta.add_head_count(heads)
    meta.add_head_count_kv(config.get("num_key_value_heads") or heads)
    meta.add_key_length(head_dim)
    meta.add_value_length(head_dim)
    meta.add_layer_norm_rms_eps(config["rms_norm_eps"])
    meta.add_rope_dimension_count(head_dim)
    meta.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        meta.add_rope_scaling_type(RopeScalingType.LINEAR)
        meta.add_rope_scaling_factor(rope["factor"])
    return notes


def _vocabulary(
    file: GGUFFile, processor: Processor, size: int, chat_template: str | None
) -> list[str]:
    meta, tokenizer, template = file.meta, processor.tokenizer, processor.template
    vocabulary = read_vocabulary(tokenizer, size)
    meta.add_tokenizer_model(vocabulary.model)
    meta.add_tokenizer_pre(vocabulary.pre)
    meta.add_token_list(vocabulary.tokens)
    meta.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        meta.add_token_scores(vocabulary.scores)
        meta.add_add_space_prefix(vocabulary.space_prefix)
    else:
        meta.add_token_merges(vocabulary.merges)
    bos = tokenizer.bos_token_id
    meta.add_add_bos_token(template.bos and bos is not None)
    meta.add_add_eos_token(False)
    # llama.cpp stops at either; where the template's end is not the tokenizer's, both are told.
    ends = zip(
        (meta.add_eos_token_id, meta.add_eot_token_id), processor.end_token_ids, strict=False
    )
    special = (
        (meta.add_bos_token_id, bos),
        *ends,
        (meta.add_unk_token_id, tokenizer.unk_token_id),
        (meta.add_pad_token_id, processor.pad_id),
    )
    for add, index in special:
        # Beyond the embedding there is nothing the model could read or say.
        if index is not None and index < size:
            add(index)
    meta.add_chat_template(chat_template or _chat_template(processor))
    return _reading_notes(processor, vocabulary)


def _chat_template(processor: Processor) -> str:
    # Older releases of llama.cpp stop at the marks of what is learnt, which they have no use for.
    text = to_jinja(processor.template, processor.system)
    return text.replace("{%- generation %}", "{%- if true %}").replace(
        "{%- endgeneration %}", "{%- endif %}"
    )


def _reading_notes(processor: Processor, vocabulary: Vocabulary) -> list[str]:
    notes = []
    wrong, tried, example = reading_differences(vocabulary, processor.tokenizer)
    if wrong:
        notes.append(
            f"llama.cpp joins pieces otherwise in {wrong} of {tried} texts made of the "
            f"vocabulary's own pieces; it reads {example}"
        )
    if vocabulary.first_only:
        notes.append("llama.cpp reads text after a special token as if a space came before it")
    if processor.stop_strings:
        notes.append(f"the stop strings {processor.stop_strings} must be given to llama.cpp")
    return notes


def _add_language(
    file: GGUFFile,
    config: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    names: dict[str, str],
) -> None:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    neighbours = LANGUAGES[config["model_type"]].neighbours
    factors = _rope_factors(config)
    if factors is not None:
        file.add("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    for ours, theirs in names.items():
        turned = {"attn_q": heads, "attn_k": kv_heads}.get(theirs.split(".")[-2])
        # 4 bits in the output layer cost far more than they save; llama.cpp keeps more there, too.
        outer = theirs in ("output.weight", "token_embd.weight")
        kind: GGUFType | None = "q8_0" if outer and file.kind == "q4_0" else None

        def read(ours: str = ours, turned: int | None = turned) -> torch.Tensor:
            value = tensors[ours]
            return to_neighbours(value, turned) if turned and neighbours else value

        file.add(theirs, tuple(tensors[ours].shape), read, kind)


def _rope_factors(config: dict[str, Any]) -> torch.Tensor | None:
    """float[d/2] by which Llama 3.1 slows each rotary frequency down; None for other scalings."""
    if config["rope_parameters"].get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    whole = config_from_dict(config, part="language model")
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](whole, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(slowed), 2, dtype=torch.float32) / (2 * len(slowed))
    base: float = config["rope_parameters"]["rope_theta"]
    factors: torch.Tensor = 1.0 / base**steps / slowed
    return factors


def _vision_metadata(
    file: GGUFFile, config: LMMConfig, processor: Processor, blocks: int
) -> list[str]:
    meta, vision, spec = file.meta, config.vision, processor.image_spec
    activation = vision["hidden_act"]
    meta.add_name(_NAME)
    meta.add_clip_has_vision_encoder(True)
    meta.add_clip_projector_type("mlp")
    meta.add_vision_image_size(vision["image_size"])
    meta.add_vision_patch_size(vision["patch_size"])
    meta.add_vision_embedding_length(vision["hidden_size"])
    meta.add_vision_feed_forward_length(vision["intermediate_size"])
    meta.add_vision_projection_dim(config.language["hidden_size"])
    meta.add_vision_block_count(blocks)
    meta.add_vision_head_count(vision["num_attention_heads"])
    meta.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    # Without it llama.cpp stops one block before the last it is given.
    meta.add_array("clip.vision.feature_layer", [blocks])
    meta.add_vision_image_mean(list(spec.mean))
    meta.add_vision_image_std(list(spec.std))
    meta.add_vision_use_gelu(activation != "quick_gelu")
    notes = ["llama.cpp computes the connector's GELU by the tanh formula, we by erf"]
    if vision["model_type"] == "clip_vision_model":
        notes.append(_CLASS_TOKEN)
    if activation == "gelu":
        notes.append("llama.cpp computes the vision backbone's GELU by the tanh formula, too")
    if spec.mode != "pad" or spec.canvas_color != _PAD_COLOR:
        notes.append(
            f"llama.cpp pads every image to a square with the colour {_PAD_COLOR}; this model's "
            f"images are prepared by {spec.mode} (colour {spec.canvas_color})"
        )
    return notes


def _add_vision(file: GGUFFile, tensors: Mapping[str, torch.Tensor], names: dict[str, str]) -> None:
    for ours, theirs in names.items():
        # ggml's convolution takes f16 or f32 kernels, and rows of positions are looked up in f32.
        kind: GGUFType | None = None
        if theirs == "v.patch_embd.weight":
            kind = "f16" if file.kind == "f16" else "f32"
        elif theirs == "v.position_embd.weight":
            kind = "f32"

        def read(ours: str = ours) -> torch.Tensor:
            return tensors[ours]

        file.add(theirs, tuple(tensors[ours].shape), read, kind)
