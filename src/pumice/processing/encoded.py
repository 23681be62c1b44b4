"""A conversation in numbers, ready for a batch.

Shapes: N = views of all images (an image that is not tiled has one), S = side of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from pumice.core.types import Sample
from pumice.models.constants import IGNORE

Image = TypeVar("Image")
"""Whatever stands for one."""


@dataclass
class Encoded:
    """One conversation ready for a batch: `pixel_values` float[N, 3, S, S], lists of one length.

    `labels` hold the id itself where it is learnt and IGNORE elsewhere; `input_ids` hold IMAGE_ID
    once for every image token. `image_sizes` are width and height of each upright image and
    `grids` its tiles (columns, rows), both empty where images were not opened and need not be.
    `instructions` are the ids of what is asked of each image, for connectors that read it.
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor
    num_images: int
    sample_id: str = ""
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    instructions: list[list[int]] = field(default_factory=list)

    @property
    def num_supervised(self) -> int:
        """How many tokens are learnt."""
        return len(self.labels) - self.labels.count(IGNORE)


def sample_named(sample: Sample) -> str:
    """How errors name a sample."""
    return f"sample {sample.id!r}" + (f" ({sample.source})" if sample.source else "")


def images_named(images: Sequence[Image], where: str) -> list[tuple[Image, str]]:
    """Each image of a sample or a request, and how errors name it: by number if it is not alone."""
    places = [f"{where}, image {number} of {len(images)}" for number in range(1, len(images) + 1)]
    return list(zip(images, places if len(images) > 1 else [where], strict=False))
