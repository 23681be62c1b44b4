"""InstructBLIP on a decoder-only language model (Vicuna), as transformers stores it.

Its Q-Former is the connector `qformer`, whose weights keep their names. All features go into it,
the class token's too, behind the vision backbone's final norm. The image stands before BOS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.models.config import LMMConfig
from pumice.models.connectors.qformer import QFormer
from pumice.models.pretrained import config_to_dict, read_config
from pumice.processing.images import CLIP_MEAN, CLIP_STD, ImageSpec
from pumice.processing.processor import Processor
from pumice.processing.templates import Piece, Template, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_TYPE = "instructblip"
QFORMER_TOKENIZER = "qformer_tokenizer"

_PREFIXES = (
    ("vision_model.", "vision.model."),
    ("query_tokens", "connector.query_tokens"),
    ("qformer.", "connector.qformer."),
    ("language_projection.", "connector.language_projection."),
    ("language_model.", "language.model."),
)
# Tables older releases stored although they follow from the config.
_COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)")


def detect(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is InstructBLIP's."""
    return config.get("model_type") == MODEL_TYPE


def instructblip_config(directory: Path | str) -> LMMConfig:
    """The architecture of an InstructBLIP folder; Flan-T5 and other Q-Formers are refused."""
    config = read_config(directory, part="InstructBLIP model")
    text, qformer = config.text_config, config.qformer_config
    if getattr(text, "is_encoder_decoder", False):
        raise PumiceError(
            f"{directory} is an InstructBLIP with the encoder-decoder {text.model_type!r} "
            f"(Flan-T5): its language model reads the picture in an encoder, and pumice's language "
            f"models are decoders that read it in the text. Use a decoder-only one, such as "
            f"instructblip-vicuna-7b."
        )
    kind = getattr(qformer, "position_embedding_type", "absolute")
    if qformer.hidden_act != "gelu" or kind != "absolute":
        raise PumiceError(
            f"the Q-Former of {directory} has hidden_act {qformer.hidden_act!r} and "
            f"position_embedding_type {kind!r}; only gelu and absolute are supported, which all "
            f"published InstructBLIP checkpoints have."
        )
    return LMMConfig(
        vision=config_to_dict(config.vision_config),
        vision_layer=-1,
        vision_select="cls_patch",
        vision_norm=True,
        connector="qformer",
        connector_options=qformer_options(qformer, config.num_query_tokens),
        language=config_to_dict(text),
    )


def qformer_options(config: Any, queries: int) -> dict[str, Any]:
    """The options of the connector `qformer` that say what InstructBlipQFormerConfig says."""
    return {
        "queries": queries,
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "every": config.cross_attention_frequency,
        "hidden": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_instruction": config.max_position_embeddings,
        "dropout": float(config.hidden_dropout_prob),
        "norm_eps": config.layer_norm_eps,
    }


def pumice_name(name: str, depth: int) -> str | None:
    """A tensor's name in an LMM, `depth` the Q-Former's blocks; None for what nothing reads.

    That is the half for text of the last block, and tables which follow from the config.
    """
    last = f"qformer.encoder.layer.{depth - 1}."
    if name.startswith((f"{last}intermediate.", f"{last}output.")) or _COMPUTED.fullmatch(name):
        return None
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise PumiceError(
        f"an InstructBLIP checkpoint holds the unknown tensor {name!r}; known are "
        f"{', '.join(theirs for theirs, _ in _PREFIXES)}. Take an InstructBLIP that transformers "
        f"saved."
    )


def instructblip_template(tokenizer: PreTrainedTokenizerFast) -> Template:
    """Image, what the tokenizer puts before a text (BOS), the question as it is, the answer."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = whole[: len(whole) - len(plain)]
    bos = start == [tokenizer.bos_token_id]
    # Vicuna's InstructBLIP names </s> its BOS while its tokenizer may write another token.
    pieces: tuple[Piece, ...] = tuple(
        Token(str(token)) for token in tokenizer.convert_ids_to_tokens([] if bos else start)
    )
    return Template(
        name="instructblip",
        bos=bos,
        before_system=pieces,
        no_system=pieces,
        # Answers were tokenised by themselves, which puts a space before their first word.
        before_answer=" ",
        images_first=True,
    )


def instructblip_images(directory: Path | str) -> ImageSpec:
    """The image preparation of BlipImageProcessor: stretched to the square."""
    directory = Path(directory)
    whole, alone = directory / "processor_config.json", directory / "preprocessor_config.json"
    data: dict[str, Any] = read_json(whole).get("image_processor", {}) if whole.is_file() else {}
    if not data and alone.is_file():
        data = read_json(alone)
    size = data.get("size") or {}
    height, width = size.get("height"), size.get("width")
    if not isinstance(height, int) or height != width:
        raise PumiceError(
            f"{directory} has no image preparation with equal height and width (found size: "
            f"{size or 'none'}). preprocessor_config.json or processor_config.json of the "
            f"published checkpoint is needed; copy it there."
        )
    mean, std = data.get("image_mean") or CLIP_MEAN, data.get("image_std") or CLIP_STD
    means, stds = (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
    return ImageSpec("resize", height, means, stds, transparency="ignored")


def instruction_tokenizer(directory: Path | str) -> PreTrainedTokenizerFast:
    """The BERT tokenizer in which the Q-Former reads the question."""
    from transformers import PreTrainedTokenizerFast

    folder = Path(directory) / QFORMER_TOKENIZER
    if not (folder / "tokenizer.json").is_file():
        raise PumiceError(
            f"{folder} holds no tokenizer.json; the Q-Former of an InstructBLIP reads the question "
            f"with the BERT tokenizer that belongs there. Copy the published checkpoint in full."
        )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def instructblip_processor(directory: Path | str) -> Processor:
    """The processor of an InstructBLIP folder; both tokenizers are taken as they are."""
    from transformers import PreTrainedTokenizerFast

    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file():
        raise PumiceError(
            f"{directory} holds no tokenizer.json; the tokenizer of the language model belongs "
            f"there. Copy the published checkpoint in full."
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return Processor(
        tokenizer,
        instructblip_images(directory),
        instructblip_template(tokenizer),
        None,
        read_config(directory, part="InstructBLIP model").num_query_tokens,
        instruction=instruction_tokenizer(directory),
    )


def load_qformer_weights(
    connector: QFormer,
    names: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Fills a new Q-Former from an InstructBLIP checkpoint; the projection stays new.

    `names` are its tensors with their shapes, `read` gives one of them. The projection to the
    language model is left out: it is of the other language model's width and space.
    """
    depth = len(connector.layers)
    state = connector.state_dict()
    wanted = [name for name in state if not name.startswith("language_projection.")]
    misfits = [name for name in wanted if tuple(state[name].shape) != names.get(name)]
    spare = [
        name
        for name in names
        if name.startswith("qformer.") and pumice_name(name, depth) and name not in state
    ]
    if misfits or spare:
        first = (misfits or spare)[0]
        expected = tuple(state[first].shape) if first in state else "no such tensor"
        raise PumiceError(
            f"the InstructBLIP weights do not fit this qformer: {len(misfits) + len(spare)} "
            f"tensors differ, such as {first}, which is {names.get(first, 'missing')} there and "
            f"{expected} here. Give the connector the checkpoint's own options (queries, "
            f"width, depth, heads, vocab_size) and a vision backbone of its feature width."
        )
    with torch.no_grad():
        for name in wanted:
            state[name].copy_(read(name))
