"""RefCOCO, RefCOCO+, RefCOCOg and Visual Genome: phrases with boxes, asked for in both directions.

Boxes are x1, y1, x2, y2 between 0 and 1 in the square that the padded picture fills.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from pumice.data.academic.base import (
    COCO_IMAGE,
    Row,
    Rules,
    Tally,
    drawn,
    grouped,
    llava_row,
    segments,
    stem,
)
from pumice.processing.response_formats import box_prompt, format_box, region_prompt


class RegionRules(Rules):
    """The rules of phrases with boxes."""

    image: str = Field(COCO_IMAGE, description="How a row names its image, below --images.")
    frame: Literal["padded", "image"] = Field(
        "padded", description="Boxes in the square of the padded picture, or in the picture."
    )
    direction: Literal["random", "box", "phrase"] = Field(
        "random", description="Ask for the box, for the phrase, or for either, drawn by the seed."
    )
    rounds: int | None = Field(10, ge=1, description="So many regions a row at most.")
    over: Literal["sample", "segment"] = Field(
        "sample", description="An image with more: so many are drawn, or it has several rows."
    )
    seed: int = Field(0, description="Draws regions and directions.")


class Region(NamedTuple):
    """A phrase, its box (x, y, width, height in pixels) and the picture's width and height."""

    image: str
    phrase: str
    box: tuple[float, float, float, float]
    size: tuple[int, int]


def region_rows(regions: Iterable[Region], rules: RegionRules, tally: Tally) -> Iterator[Row]:
    """Rows of regions, those of an image together."""
    kept = ((region.image, region) for region in _usable(regions, tally))
    for image, some in grouped(kept).items():
        for name, piece in _pieces(image, some, rules, tally):
            # The image names the draw, so that no row depends on the others.
            rng = random.Random(f"direction {rules.seed} {name} {image}")
            yield llava_row(name, image, [_round(region, rules, rng) for region in piece])


def _usable(regions: Iterable[Region], tally: Tally) -> Iterator[Region]:
    for region in regions:
        x, y, width, height = region.box
        right, bottom = min(x + width, region.size[0]), min(y + height, region.size[1])
        x1, y1 = max(x, 0.0), max(y, 0.0)
        if not region.phrase:
            tally.dropped["region without phrase"] += 1
        elif not all(map(math.isfinite, region.box)):
            tally.dropped["box with a number that is none"] += 1
        elif right <= x1 or bottom <= y1:
            tally.dropped["box without area in the picture"] += 1
        else:
            inside = (x1, y1, right - x1, bottom - y1)
            beyond = max(abs(a - b) for a, b in zip(inside, region.box, strict=True))
            # Annotated by hand: half a pixel over the edge is no other box.
            tally.changed["box reached out of the picture and was cut"] += beyond > 0.5
            yield region._replace(box=inside)


def _pieces(
    image: str, regions: list[Region], rules: RegionRules, tally: Tally
) -> Iterator[tuple[str, Sequence[Region]]]:
    if rules.rounds is not None and len(regions) > rules.rounds and rules.over == "sample":
        reason = f"region beyond the {rules.rounds} drawn of an image"
        tally.dropped[reason] += len(regions) - rules.rounds
        regions = drawn(regions, rules.rounds, "regions", rules.seed, image)
    pieces = segments(regions, rules.rounds)
    for number, piece in enumerate(pieces, start=1):
        yield stem(image) if len(pieces) == 1 else f"{stem(image)}-{number}", piece


def _round(region: Region, rules: RegionRules, rng: random.Random) -> tuple[str, str]:
    box = framed_box(region.box, region.size, rules.frame)
    drawn_ = rng.choice(("box", "phrase"))
    if (drawn_ if rules.direction == "random" else rules.direction) == "phrase":
        return region_prompt(box), region.phrase
    return box_prompt(region.phrase.rstrip(".")), format_box(box)


def framed_box(
    box: Sequence[float], size: tuple[int, int], frame: Literal["padded", "image"]
) -> tuple[float, float, float, float]:
    """x, y, width, height in pixels -> x1, y1, x2, y2 as shares of the frame."""
    x, y, width, height = box
    across, down = size
    if frame == "image":
        return x / across, y / down, (x + width) / across, (y + height) / down
    side = max(size)
    # Whole pixels, as the padding itself.
    left, top = (side - across) // 2, (side - down) // 2
    return (
        (x + left) / side,
        (y + top) / side,
        (x + width + left) / side,
        (y + height + top) / side,
    )
