"""What the data engine knows of each image: captions and boxes, from COCO files or JSONL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import HALF_CHARACTER, read_json, read_jsonl

Box = tuple[str, tuple[float, float, float, float]]
"""Category and x0, y0, x1, y1 as shares of width and height."""


@dataclass(frozen=True, slots=True)
class Described:
    """An image in words; `sources` name the annotations they come from."""

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()
    sources: tuple[str, ...] = ()


def read_described(captions: Path, boxes: Path | None = None) -> list[Described]:
    """Every image that has captions, in the order of the captions file.

    COCO: `captions_*.json` and `instances_*.json` (boxes [x, y, w, h] in pixels; crowds are left
    out). JSONL: rows `{"image", "captions", "boxes": [{"category", "box": [x0, y0, x1, y1]}]}` with
    shares of width and height; both files may be the same one.
    """
    found = _read(captions)
    named = found if boxes == captions else _read(boxes) if boxes is not None else {}
    whole = [
        Described(
            id=str(entry.get("id", name)),
            image=name,
            captions=tuple(entry["captions"]),
            boxes=tuple(named.get(name, {}).get("boxes", ())),
            # A row of JSONL with captions and boxes is one source, not one for each.
            sources=tuple(
                dict.fromkeys([*entry["sources"], *named.get(name, {}).get("box_sources", ())])
            ),
        )
        for name, entry in found.items()
        if entry["captions"]
    ]
    if not whole:
        raise DataError(f"{captions}: no image has a caption; give COCO captions or JSONL rows.")
    return whole


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return _rows(path) if path.suffix == ".jsonl" else _coco(path)


def _coco(path: Path) -> dict[str, dict[str, Any]]:
    content = read_json(path)
    try:
        images = {entry["id"]: entry for entry in content["images"]}
        categories = {entry["id"]: entry["name"] for entry in content.get("categories", ())}
        found: dict[str, dict[str, Any]] = {
            entry["file_name"]: _entry(str(entry["id"])) for entry in images.values()
        }
        for note in content["annotations"]:
            image = images[note["image_id"]]
            entry, name = found[image["file_name"]], f"{path.stem}:{note['id']}"
            if "caption" in note:
                if caption := _one_line(note["caption"]):
                    entry["captions"].append(caption)
                    entry["sources"].append(name)
            elif not note.get("iscrowd"):
                x, y, w, h = note["bbox"]
                width, height = image["width"], image["height"]
                box = (x / width, y / height, (x + w) / width, (y + h) / height)
                entry["boxes"].append(_box(categories[note["category_id"]], box, name))
                entry["box_sources"].append(name)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"{path}: this is no COCO file of captions or instances ({error!r}). It needs images "
            f"and annotations, and categories where there are boxes. JSONL ends in .jsonl."
        ) from error
    return found


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        try:
            if not isinstance(row["image"], str):
                raise TypeError(f"image is {row['image']!r}, no name")
            entry = found.setdefault(row["image"], _entry(str(row.get("id", row["image"]))))
            name = f"{path.stem}:{number}"
            captions = row.get("captions", ())
            if isinstance(captions, str):
                raise TypeError("captions must be a list")
            entry["captions"] += filter(None, map(_one_line, captions))
            entry["sources"].append(name)
            for box in row.get("boxes") or ():
                entry["boxes"].append(_box(box["category"], box["box"], where))
                entry["box_sources"].append(name)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: a row needs image, captions (a list) and, where there are boxes, "
                f"category and box of each; this one fails with {error!r}. Correct it."
            ) from error
    return found


def _entry(name: str) -> dict[str, Any]:
    return {"id": name, "captions": [], "sources": [], "boxes": [], "box_sources": []}


def _box(category: str, box: Sequence[float], where: str) -> Box:
    x0, y0, x1, y1 = (float(edge) for edge in box)
    if not (-0.01 <= x0 <= x1 <= 1.01 and -0.01 <= y0 <= y1 <= 1.01):
        raise DataError(
            f"{where}: the box {list(box)} does not lie in its image; allowed: x0, y0, x1, y1 from "
            f"0 to 1, the smaller first. Correct it."
        )
    return category, (max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0))


def _one_line(caption: Any) -> str:
    if not isinstance(caption, str):
        raise TypeError(f"a caption is {caption!r}, no text")
    if HALF_CHARACTER.search(caption):
        raise ValueError(f"the caption {caption!r} holds half a character (a lone surrogate)")
    return " ".join(caption.split())
