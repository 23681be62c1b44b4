"""Builders of tiny random folders, models and processors: no test needs a network or weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pumice.infer.best_decoder import FAMILIES
from pumice.models.constants import IMAGE_ID
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor

WORDS = "the a is what in of cat dog red blue circle square USER ASSISTANT Answer question".split()
IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2


def tokenizer_folder(folder: Path) -> Path:
    """A Llama-style tokenizer: <unk> <s> </s>, leading space mark, any UTF-8 through bytes."""
    space = "\u2581"
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"])}
    for entry in [f"<0x{i:02X}>" for i in range(256)] + [chr(i) for i in range(33, 127)] + [space]:
        vocab.setdefault(entry, len(vocab))
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = space
        for char in word:
            if left + char not in vocab:
                vocab[left + char] = len(vocab)
                merges.append((left, char))
            left += char
    model = BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def vision_folder(folder: Path, model_type: str = "clip_vision_model", seed: int = 0) -> Path:
    """A vision backbone with random weights: 32 px images, patches of 8, width 32, 4 blocks."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(vision_config(model_type))
    spread(model)
    model.save_pretrained(folder)
    return folder


def vision_config(model_type: str = "clip_vision_model") -> Any:
    """The config of `vision_folder`."""
    return AutoConfig.for_model(
        model_type,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )


def language_folder(
    folder: Path, vocab_size: int = 0, tied: bool = True, seed: int = 1, positions: int = 512
) -> Path:
    """A Llama with random weights beside its tokenizer: width 32, 2 blocks, grouped keys."""
    tokenizer_folder(folder)
    known = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(max(vocab_size, known), tied, positions))
    spread(model)
    model.save_pretrained(folder)
    return folder


def language_config(vocab_size: int, tied: bool = True, positions: int = 512) -> LlamaConfig:
    """The config of `language_folder`."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Weights of std 0.2: fresh ones make all answers alike, wider ones let a wrong order show."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)


@torch.no_grad()
def shake(model: torch.nn.Module, by: float = 0.3) -> None:
    """Every weight away from its start, gates, biases and norms too."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=by)


def new_lmm(vision: Path, language: Path, **more: Any) -> LMM:
    """The folders' backbones and a new connector; equal for equal folders."""
    torch.manual_seed(0)
    return LMM.from_backbones(vision, language, "mlp2x_gelu", -2, "patch", **more).eval()


def processor_for(lmm: LMM, language: Path, **image: Any) -> Processor:
    """The processor of such a model; `image` are settings of its ImageSpec."""
    spec = ImageSpec(image.pop("mode", "pad"), IMAGE_SIZE, **image)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(language)
    return Processor(tokenizer, spec, "vicuna_v1", "", lmm.image_tokens, view_side=lmm.view_side)


def noise(seed: int, size: tuple[int, int] = (40, 24)) -> PIL.Image.Image:
    """A picture of random pixels, equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())


def smooth(width: int = 24, height: int = 16, seed: int = 0) -> PIL.Image.Image:
    """A smooth picture with some grain: like a photograph to a resampling filter."""
    generator = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = np.stack([np.sin(6 * x + y), np.cos(5 * y - x), np.sin(9 * x * y)], axis=-1)
    grain = generator.normal(scale=0.1, size=waves.shape)
    return PIL.Image.fromarray(((waves + grain).clip(-1, 1) * 127 + 128).astype(np.uint8))


def pixels(n: int, seed: int = 0) -> torch.Tensor:
    """float[n, 3, 32, 32], equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def with_images(rows: list[list[int]]) -> torch.Tensor:
    """Ids in which -1 stands for one image."""
    return torch.tensor(
        [[t for i in row for t in ([IMAGE_ID] * NUM_PATCHES if i < 0 else [i])] for row in rows]
    )


LLAMA_KINDS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}),
]
"""What `with_language` takes: language models that decoders of our own run."""


def with_language(lmm: LMM, family: str, **more: Any) -> LMM:
    """The model with a new language model of that family, of whose weights none is near zero."""
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": lmm.language.vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": None,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            **more,
        },
    )
    torch.manual_seed(1)
    lmm.language = LanguageModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in lmm.language.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return lmm
