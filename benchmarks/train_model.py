"""What `train.py` trains: models of stated shapes with random weights, and drawn conversations.

Conversations are as long as LLaVA-1.5's 665K: 300 +- 250 tokens of text, of which the last 60 % are
learnt, and 10 % without an image. Neither weights nor pixels change a time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from pumice.data.packing import Packing, Size, pack_rows
from pumice.models.config import LMMConfig
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.models.lmm import LMM
from pumice.models.pretrained import config_to_dict
from pumice.processing.collate import Batch, collate_packed
from pumice.processing.encoded import Encoded

# Of text, in tokens; the 665K's own mean and spread.
MEAN, SPREAD, SHORTEST, LONGEST, TEXT_ONLY, LEARNT = 300, 250, 30, 2000, 0.1, 0.6


@dataclass(frozen=True)
class Shape:
    """Widths and depths of both backbones."""

    vision: tuple[int, int, int, int]
    """Width, blocks, side of a picture, side of a patch."""
    language: tuple[int, int, int, int]
    """Width, blocks, inner width, vocabulary."""
    head: int = 64
    """Width of the language model's heads; those of the vision backbone are at most 64."""

    def scaled(self, factor: float) -> Shape:
        """The same with every width, depth, side and vocabulary so many times as large.

        Widths stay multiples of a head's, sides of a patch's. For trying the way of a large shape.
        """
        if factor == 1.0:
            return self

        def at_least(value: int, unit: int, least: int = 1) -> int:
            return unit * max(least, round(factor * value / unit))

        width, blocks, side, patch = self.vision
        vision = (at_least(width, 64), at_least(blocks, 1, 2), at_least(side, patch, 4), patch)
        width, blocks, inner, vocabulary = self.language
        return Shape(
            vision,
            (at_least(width, self.head), at_least(blocks, 1, 2), at_least(inner, 16),
             at_least(vocabulary, 100)),
            self.head,
        )  # fmt: skip


SHAPES = {
    "pocket": Shape((128, 4, 96, 16), (128, 5, 352, 1335), head=32),
    "mid": Shape((256, 6, 224, 14), (512, 8, 1408, 32000)),
    "llava15-7b": Shape((1024, 24, 336, 14), (4096, 32, 11008, 32000), head=128),
    "llava15-13b": Shape((1024, 24, 336, 14), (5120, 40, 13824, 32000), head=128),
}


def model_config(shape: Shape) -> LMMConfig:
    """LLaVA-1.5's architecture in this shape."""
    width, blocks, side, patch = shape.vision
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks,
        num_attention_heads=width // min(shape.head, 64), image_size=side, patch_size=patch,
    )  # fmt: skip
    width, blocks, inner, vocabulary = shape.language
    language = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=width // shape.head, num_key_value_heads=width // shape.head,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LMMConfig(
        vision=config_to_dict(vision), vision_layer=-2, vision_select="patch",
        connector="mlp2x_gelu", language=config_to_dict(language),
    )  # fmt: skip


def new_model(shape: Shape, device: str = "cpu") -> LMM:
    """A LLaVA of this shape; the same random weights each time on the same device."""
    torch.manual_seed(0)
    with torch.device(device):
        return LMM.from_config(model_config(shape))


def conversation(lmm: LMM, rng: random.Random) -> Encoded:
    """One of drawn length; nine of ten show a picture near their beginning."""
    text = max(SHORTEST, min(LONGEST, int(rng.gauss(MEAN, SPREAD))))
    ids = [rng.randrange(3, lmm.language.vocab_size - 1) for _ in range(text)]
    image = rng.random() >= TEXT_ONLY
    asked = text - int(LEARNT * text)
    labels = [IGNORE] * asked + ids[asked:]
    if image:
        marks = lmm.image_tokens
        ids[5:5] = [IMAGE_ID] * marks
        labels[5:5] = [IGNORE] * marks
    side = lmm.vision.image_size
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    pixels = torch.randn(int(image), 3, side, side, generator=generator)
    return Encoded(ids, labels, pixels, int(image), image_sizes=[(side, side)] * int(image))


def pack(step: list[Encoded], budget: int) -> list[Batch]:
    """The rows of a step as the loader makes them."""
    sizes = [Size(len(one.input_ids), one.num_images) for one in step]
    rows = pack_rows(sizes, Packing(max(budget, max(sizes).tokens)))
    return [collate_packed([step[place] for place in row], 0) for row in rows]
