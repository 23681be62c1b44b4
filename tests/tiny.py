"""Builders of tiny random Hugging Face folders, so that tests need neither network nor weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

from pumice.models.constants import IMAGE_ID

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
    _spread(model)
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
    _spread(model)
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


def _spread(model: torch.nn.Module) -> None:
    # Fresh weights of std 0.02 make every answer look alike; wider ones let a wrong order show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)


def pixels(n: int, seed: int = 0) -> torch.Tensor:
    """float[n, 3, 32, 32], equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def with_images(rows: list[list[int]]) -> torch.Tensor:
    """Ids in which -1 stands for one image."""
    return torch.tensor(
        [[t for i in row for t in ([IMAGE_ID] * NUM_PATCHES if i < 0 else [i])] for row in rows]
    )
