"""Questions of some thirty words about two pictures, as pumice and as transformers take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import pumice
from pumice.infer.engine import Engine
from pumice.models.constants import IMAGE_ID
from pumice.models.lmm import LMM
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor


class Questions:
    """Questions in the words of a processor's tokenizer, another for every number."""

    def __init__(self, processor: Processor, image_id: int) -> None:
        """`image_id` marks the places of an image for transformers."""
        self.processor, self.image_id = processor, image_id
        self.pictures = [
            PIL.Image.effect_noise((200, 160), 60 + n).convert("RGB") for n in range(2)
        ]
        words = list(processor.tokenizer.get_vocab())
        plain = [word for word in words if word.isalpha() and word.isascii()]
        self.words = plain or [word.removeprefix("\u2581") for word in words if len(word) > 3]

    def request(self, number: int, picture: int, new: int) -> pumice.Request:
        """A question, to be answered in `new` tokens."""
        text = " ".join(self.words[(number * 37 + place) % len(self.words)] for place in range(20))
        sampling = pumice.Sampling(max_new_tokens=new, seed=number)
        return pumice.Request((pumice.user(text, self.pictures[picture]),), sampling)

    def inputs(self, requests: Sequence[pumice.Request]) -> dict[str, torch.Tensor]:
        """The same prompts as transformers takes them, padded on the left."""
        encoded = [self.processor.encode_prompt(request.messages) for request in requests]
        width = max(len(one.input_ids) for one in encoded)
        ids = torch.tensor([[0] * (width - len(e.input_ids)) + e.input_ids for e in encoded])
        mask = torch.tensor(
            [[0] * (width - len(e.input_ids)) + [1] * len(e.input_ids) for e in encoded]
        )
        return {
            "input_ids": ids.masked_fill(ids == IMAGE_ID, self.image_id),
            "attention_mask": mask,
            "pixel_values": torch.cat([one.pixel_values for one in encoded]),
        }


def endless(engine: Engine) -> Engine:
    """The engine, which never ends an answer early now, as the peer is told not to."""
    row = engine.row

    def made(request: pumice.Request, *like: Any) -> Any:
        found = row(request, *like)
        found.answer._end_tokens, found.answer._stop = (), ()
        return found

    engine.row = made  # type: ignore[method-assign]
    return engine


def word_processor(lmm: LMM, folder: Path) -> Processor:
    """A processor for a model of random weights: a word is a token; the tokenizer in `folder`."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x00>": 3}
    vocab |= {f"w{number}": number for number in range(4, lmm.language.vocab_size)}
    words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    spec = ImageSpec("pad", lmm.vision.image_size)
    return Processor(tokenizer, spec, "vicuna_v1", "", lmm.image_tokens)
