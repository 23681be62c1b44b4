"""IDEFICS (the first one: Flamingo on Llama), as transformers stores it.

Its vision model is CLIP's, its language model is Llama's, and its perceiver and gated layers are
the connector `gated_cross_attention`. The vocabulary lies in two tables there (the second was
trained while the first was frozen) and in one here; the row of `<image>` becomes the marker.
One habit stays behind: IDEFICS' processor hides images from what follows an end token, and here
only a new document does. Its dialogues hold no end token within.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.models.config import LMMConfig
from pumice.models.connectors.perceiver import ACTIVATIONS
from pumice.models.pretrained import config_to_dict, read_config
from pumice.processing.images import CLIP_MEAN, CLIP_STD, ImageSpec
from pumice.processing.processor import Processor
from pumice.processing.sentencepiece_tokenizer import read_tokenizer
from pumice.processing.templates import Template, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_TYPE = "idefics"
IMAGE = "<image>"
FAKE = Token("<fake_token_around_image>")
END = Token("<end_of_utterance>")
MARKER = "cross_attention.marker"

_EMBED, _EMBED_MORE = "model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"
_TABLES = {
    "language.model.model.embed_tokens.weight": (_EMBED, _EMBED_MORE),
    "language.model.lm_head.weight": ("lm_head.weight", "lm_head.additional_fc.weight"),
}
_PREFIXES = (
    ("model.vision_model.", "vision.model."),
    ("model.perceiver_resampler.layer_norm.", "connector.norm."),
    ("model.perceiver_resampler.latents", "connector.latents"),
    ("model.layers.", "language.model.model.layers."),
    ("model.norm.", "language.model.model.norm."),
)
_PERCEIVER = {
    "0.context_layer_norm": "feature_norm",
    "0.latents_layer_norm": "latent_norm",
    "0.q_layer_norm": "query_norm",
    "0.k_layer_norm": "key_norm",
    "0.q_proj": "query",
    "0.k_proj": "key",
    "0.v_proj": "value",
    "0.output_proj": "out",
    "1.ln": "feed_norm",
    "1.fc": "up",
    "1.c_proj": "down",
}
_GATED = {
    "cross_attn.q_proj": "query",
    "cross_attn.k_proj": "key",
    "cross_attn.v_proj": "value",
    "cross_attn.o_proj": "out",
    "cross_attn.q_layer_norm": "query_norm",
    "cross_attn.k_layer_norm": "key_norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "alpha_cross_attn": "attention_gate",
    "alpha_dense": "feed_gate",
}
_STACKS = (
    (r"model\.perceiver_resampler\.blocks\.(\d+)\.(.+)", _PERCEIVER, "connector.blocks"),
    (r"model\.gated_cross_attn_layers\.(\d+)\.(.+)", _GATED, "cross_attention.layers"),
)
# Tables older releases stored although they follow from the config, and the norm behind CLIP's
# pooled output, which IDEFICS does not read.
_UNREAD = re.compile(
    r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)|model\.vision_model\.post_layernorm\..*"
)


def detect(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is IDEFICS' (Idefics2 and 3 are of other kinds)."""
    return config.get("model_type") == MODEL_TYPE


def idefics_config(directory: Path | str) -> LMMConfig:
    """The architecture of an IDEFICS folder; what cannot be said of it in ours is refused."""
    config = read_config(directory, part="IDEFICS model")
    _check(config, directory)
    return LMMConfig(
        vision=_vision(config.vision_config),
        vision_layer=-1,
        vision_select="cls_patch",
        connector="gated_cross_attention",
        connector_options=_options(config),
        language=_language(config),
    )


def idefics_template(tokenizer: PreTrainedTokenizerFast) -> Template:
    """How IDEFICS writes a dialogue; the instructed one ends each turn with a token of its own."""
    instructed = END.name in tokenizer.get_vocab()
    return Template(
        name="idefics-instruct" if instructed else "idefics",
        after_system=("\n",),
        between_rounds=("\n",) if instructed else (),
        before_user=("User: ",),
        after_user=(END, "\nAssistant:") if instructed else ("\nAssistant:",),
        before_answer=" ",
        after_answer="" if instructed else "\n",
        end=END if instructed else None,
        stop=() if instructed else ("\nUser:",),
        around_image=(FAKE,),
    )


def idefics_images(directory: Path | str) -> ImageSpec:
    """The image preparation of IdeficsImageProcessor: stretched to the square."""
    path = Path(directory) / "preprocessor_config.json"
    data = read_json(path) if path.is_file() else {}
    size = data.get("size") or data.get("image_size")
    if isinstance(size, dict):
        size = size.get("height") if size.get("height") == size.get("width") else None
    if size is None and not data:
        size = read_config(directory, part="IDEFICS model").vision_config.image_size
    if not isinstance(size, int):
        raise PumiceError(
            f"{path} has size {data.get('size')!r}; one whole number, or an equal height and "
            f"width, is needed. Take the file of the published checkpoint."
        )
    mean, std = data.get("image_mean", CLIP_MEAN), data.get("image_std", CLIP_STD)
    return ImageSpec("resize", size, mean=tuple(mean), std=tuple(std))


def idefics_image_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The row of the embedding that stands for an image."""
    index = tokenizer.get_vocab().get(IMAGE)
    if index is None:
        raise PumiceError(
            f"the tokenizer of this IDEFICS has no {IMAGE}, whose embedding marks an image in the "
            f"text. Take the tokenizer files of the same checkpoint."
        )
    return int(index)


def idefics_processor(directory: Path | str) -> Processor:
    """The processor of an IDEFICS folder; an image is one position in the text."""
    tokenizer = read_tokenizer(directory)
    return Processor(
        tokenizer,
        idefics_images(directory),
        idefics_template(tokenizer),
        None,
        image_tokens=1,
        image_mark=True,
    )


class IdeficsTensors(Mapping[str, torch.Tensor]):
    """The tensors of an LMM, each made of IDEFICS' at the moment it is asked for.

    `names` are those of the checkpoint, `read` gives one of them, `image_id` is the row of the
    image token. A name that is not IDEFICS' is an error.
    """

    def __init__(
        self,
        names: Iterable[str],
        read: Callable[[str], torch.Tensor],
        *,
        image_id: int,
        tied: bool = False,
    ) -> None:
        self._read, self._image_id = read, image_id
        self._sources: dict[str, tuple[str, ...]] = {}
        held = set(names)
        for ours, theirs in _TABLES.items():
            if tied and theirs[0] != _EMBED:
                held -= set(theirs)
            parts = tuple(name for name in theirs if name in held)
            if theirs[0] in parts:
                self._sources[ours] = parts
                held -= set(parts)
        for name in sorted(held):
            ours_or_none = pumice_name(name)
            if ours_or_none is not None:
                self._sources[ours_or_none] = (name,)
        if "language.model.model.embed_tokens.weight" in self._sources:
            self._sources[MARKER] = self._sources["language.model.model.embed_tokens.weight"]

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [self._read(source) for source in self._sources[name]]
        if name == MARKER:
            return _row(parts, self._image_id)
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        # A gate for each channel is [1, 1, D] there.
        return tensor.reshape(-1) if name.endswith(("attention_gate", "feed_gate")) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def pumice_name(name: str) -> str | None:
    """A tensor's name in an LMM; None for what nothing reads. The vocabulary's are apart."""
    if _UNREAD.fullmatch(name):
        return None
    for pattern, table, prefix in _STACKS:
        found = re.fullmatch(pattern, name)
        if found is None:
            continue
        stem, _, kind = found[2].rpartition(".")
        if found[2] in table:
            return f"{prefix}.{found[1]}.{table[found[2]]}"
        if stem in table:
            return f"{prefix}.{found[1]}.{table[stem]}.{kind}"
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise PumiceError(
        f"an IDEFICS checkpoint holds the unknown tensor {name!r}; known are the vision model, the "
        f"perceiver, the gated layers and Llama's. Take an IDEFICS that transformers saved."
    )


def _check(config: Any, directory: Path | str) -> None:
    complaint = ""
    if not config.use_resampler:
        complaint = "use_resampler is false: its layers look at all patches, here at latents only"
    elif config.num_hidden_layers % config.cross_layer_interval:
        complaint = (
            f"{config.num_hidden_layers} blocks do not divide by the cross_layer_interval "
            f"{config.cross_layer_interval}"
        )
    elif config.hidden_act not in ACTIVATIONS:
        complaint = f"hidden_act is {config.hidden_act!r}; allowed: {', '.join(ACTIVATIONS)}"
    elif config.vision_config.num_channels != 3:
        complaint = f"its pictures have {config.vision_config.num_channels} channels, not 3"
    if complaint:
        raise PumiceError(
            f"the IDEFICS in {directory} cannot be opened: {complaint}. Use one like the published "
            f"idefics-9b or idefics-80b."
        )


def _vision(config: Any) -> dict[str, Any]:
    from transformers import CLIPVisionConfig

    same = (
        "image_size",
        "patch_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "attention_dropout",
    )
    values = {name: getattr(config, name) for name in same}
    return config_to_dict(CLIPVisionConfig(hidden_size=config.embed_dim, **values))


def _options(config: Any) -> dict[str, Any]:
    perceiver = config.perceiver_config
    return {
        "queries": perceiver.resampler_n_latents,
        "depth": perceiver.resampler_depth,
        "heads": perceiver.resampler_n_heads,
        "head_width": perceiver.resampler_head_dim,
        "latent_qk_norm": perceiver.qk_layer_norms_perceiver,
        "latent_activation": "relu",
        "every": config.cross_layer_interval,
        "cross_heads": config.num_attention_heads,
        "qk_norm": config.qk_layer_norms,
        "norm": "rms",
        "norm_eps": config.rms_norm_eps,
        "feed_forward": "glu",
        "feed_forward_width": config.intermediate_size,
        "activation": config.hidden_act,
        "gate": "vector" if config.alpha_type == "vector" else "scalar",
    }


def _language(config: Any) -> dict[str, Any]:
    from transformers import LlamaConfig

    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    values = {name: getattr(config, name) for name in same}
    rows = config.vocab_size + config.additional_vocab_size
    return config_to_dict(LlamaConfig(vocab_size=rows, **values))


def _row(parts: list[torch.Tensor], index: int) -> torch.Tensor:
    for part in parts:
        if index < len(part):
            return part[index].clone()
        index -= len(part)
    raise PumiceError(
        f"the tokenizer's {IMAGE} lies {index + 1} rows behind the end of the embedding; the "
        f"tokenizer belongs to another checkpoint. Take the files of one."
    )
