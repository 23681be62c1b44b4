"""Controls: the same questions in a way that a model can only answer by not looking."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pumice.core.errors import DataError
from pumice.core.registry import Registry
from pumice.eval.benchmark import Item


@dataclass(frozen=True, slots=True)
class Control:
    """A way to ask: `title` stands behind the benchmark's name, `apply` takes items and a seed."""

    title: str
    apply: Callable[[Sequence[Item], int], list[Item]]


def shuffle_images(items: Sequence[Item], seed: int = 0) -> list[Item]:
    """Every image is exchanged for another one; questions and truths stay.

    The exchange is between images, not items: questions about one image get the same other image,
    so the control costs what the benchmark costs. Items without an image stay as they are.
    """
    images = sorted({item.image for item in items if item.image is not None})
    if len(images) < 2:
        raise DataError(
            f"the shuffled-image control needs at least 2 images, given {len(images)}; raise "
            f"--limit or use a benchmark with more images."
        )
    random.Random(seed).shuffle(images)
    # A step along one random cycle: nobody keeps the own image, whatever the seed.
    other: dict[Path, Path] = dict(zip(images, images[1:] + images[:1], strict=True))
    return [
        item if item.image is None else replace(item, image=other[item.image]) for item in items
    ]


CONTROLS: Registry[Control] = Registry(
    "control",
    {
        "shuffled": Control("shuffled images", shuffle_images),
    },
)
