"""Referring expressions: the model answers a phrase with the box of the thing it describes.

File: refcoco_val.json, COCO style: images with width and height, annotations with bbox and caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json
from pumice.eval.benchmark import Benchmark, Floats, Item, Row, Sums, percent
from pumice.eval.locate import ImageFinder, find_file, require
from pumice.processing.response_formats import BOX, box_prompt, format_box

Box = tuple[float, float, float, float]

_NUMBER = r"\s*(0?\.\d+|0|1(?:\.0*)?|0\.)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


class RefCoco(Benchmark):
    """Mean IoU and the share of boxes with IoU of at least 0.5."""

    name = "refcoco"
    title = "RefCOCO"
    headline = "acc@0.5"

    def load(self, data_dir: Path) -> list[Item]:
        """One item per phrase; `truth` is the box in the frame the model sees."""
        file = find_file(data_dir, self.name, ["refcoco_val.json"])
        content = read_json(file)
        require(content, ("images", "annotations"), str(file))
        images = {image["id"]: image for image in content["images"]}
        find_image = ImageFinder(data_dir, self.name)
        items = []
        for index, row in enumerate(content["annotations"]):
            require(
                row,
                ("id", "image_id", "bbox", "caption"),
                f"{file}, annotation {index}",
                texts=("caption",),
                ids=("id", "image_id"),
            )
            image = images.get(row["image_id"])
            if image is None or min(image["width"], image["height"]) <= 0:
                raise DataError(
                    f"refcoco: annotation {row['id']} of {file} names image {row['image_id']}, "
                    f"which has no entry with a width and a height there. Take the complete file."
                )
            items.append(
                Item(
                    id=str(row["id"]),
                    image=find_image(image["file_name"]),
                    prompt=box_prompt(row["caption"]),
                    truth=padded_square_box(row["bbox"], image["width"], image["height"]),
                    group=str(row["image_id"]),
                )
            )
        return items

    def parse(self, text: str, item: Item) -> str | None:
        """The first "[x0, y0, x1, y1]" of four numbers in 0..1; None when there is none."""
        found = _BOX.search(text)
        return None if found is None else f"[{', '.join(found.groups())}]"

    def score(self, parsed: str | None, item: Item) -> float:
        """The IoU with the true box; 0 for an answer without a box."""
        return 0.0 if parsed is None else iou(_read(parsed), item.truth)

    def tally(self, row: Row) -> dict[str, float]:
        """Count, IoU, and whether it is at least 0.5."""
        score = row.prediction.score or 0.0
        return {"n": 1.0, "iou": score, "hit": float(score >= 0.5)}

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """acc@0.5 and mean IoU in percent, each float[...]."""
        return {
            "acc@0.5": percent(sums["hit"], sums["n"]),
            "mean_iou": percent(sums["iou"], sums["n"]),
        }

    def truth_text(self, item: Item) -> str:
        """The true box as answers write it."""
        return format_box(item.truth)

    def base_answers(self, items: Sequence[Item]) -> dict[str, str]:
        """The same box for everything: the median of the true ones, side by side."""
        box = [median(item.truth[side] for item in items) for side in range(4)]
        return {item.id: format_box(box) for item in items}

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric; boxes are in the frame of the padded square."""
        return {
            "prompt": BOX,
            "parser": "first [x0, y0, x1, y1] of four decimals in 0..1",
            "metric": "IoU in the padded-square frame; no box counts as IoU 0; percent",
            "split": "val",
        }


def padded_square_box(bbox: Sequence[float], width: int, height: int) -> Box:
    """COCO x, y, w, h in pixels -> x0, y0, x1, y1 in 0..1 of the image padded to a square.

    The image lies in the middle of the square; an odd rest goes right or below, as in padding.
    """
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x, y, w, h = bbox
    x0, y0 = (x + left) / side, (y + top) / side
    return (x0, y0, x0 + w / side, y0 + h / side)


def iou(one: Box, other: Box) -> float:
    """Area of the intersection over area of the union; 0 for boxes with no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, width) * max(0.0, height)
    either = _area(one) + _area(other) - both
    return both / either if either > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _read(parsed: str) -> Box:
    x0, y0, x1, y1 = (float(number) for number in parsed.strip("[]").split(","))
    return (x0, y0, x1, y1)
