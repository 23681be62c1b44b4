"""Controls: the same questions in a way that a model can only answer by not looking."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image

from pumice.core.errors import DataError
from pumice.core.files import write_atomic
from pumice.core.images import image_size
from pumice.core.registry import Registry
from pumice.eval.benchmark import Item

_GREY = (127, 127, 127)


@dataclass(frozen=True, slots=True)
class Control:
    """A way to ask: `title` stands behind the benchmark's name.

    `apply` takes items, a seed, and a directory for pictures that it makes.
    """

    title: str
    apply: Callable[[Sequence[Item], int, Path], list[Item]]


def shuffle_images(items: Sequence[Item], seed: int, _out_dir: Path) -> list[Item]:
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


def blank_images(items: Sequence[Item], _seed: int, out_dir: Path) -> list[Item]:
    """Every image is exchanged for a grey one of its size; questions and truths stay.

    The size stays because a model that tiles takes as many tokens from it. An image whose size
    cannot be read stays, and its item fails as it would have.
    """
    blank = {image: _blank(image, out_dir) for image in {item.image for item in items} if image}
    return [
        item if item.image is None else replace(item, image=blank[item.image]) for item in items
    ]


def _blank(image: Path, out_dir: Path) -> Path:
    try:
        width, height = image_size(image)
    except DataError:
        return image
    path = out_dir / "blank" / f"{width}x{height}.png"
    if not path.is_file():
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (width, height), _GREY).save(buffer, "PNG")
        write_atomic(path, buffer.getvalue(), sync=False)
    return path


CONTROLS: Registry[Control] = Registry(
    "control",
    {
        "shuffled": Control("shuffled images", shuffle_images),
        "blank": Control("blank images", blank_images),
    },
)
