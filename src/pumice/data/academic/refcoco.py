"""RefCOCO, RefCOCO+ and RefCOCOg: phrases people used to tell a thing from the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pumice.core.errors import DataError
from pumice.data.academic.base import Row, Task, clean, image_name, take
from pumice.data.academic.refs_file import read_refs
from pumice.data.academic.regions import Region, RegionRules, region_rows


class RefcocoRules(RegionRules):
    """The rules of RefCOCO."""

    rounds: int | None = Field(
        9, ge=1, description="So many phrases a row at most; LLaVA-1.5: fewer than 10."
    )
    over: Literal["sample", "segment"] = Field(
        "segment", description="An image with more: so many are drawn, or it has several rows."
    )
    split: str = Field("train", description="The split whose phrases are taken.")


def refcoco_rows(task: Task[RefcocoRules]) -> Iterator[Row]:
    """Rows of the phrases of a split; the sets that are given together are merged by image."""
    return region_rows(_regions(task), task.rules, task.tally)


def _regions(task: Task[RefcocoRules]) -> Iterator[Region]:
    refs, boxes, sizes = _read(task)
    if not refs or not boxes:
        raise DataError(
            f"{'refs(...).p' if not refs else 'instances.json'} is missing among the files; "
            f"RefCOCO has its phrases in one and its boxes in the other. Give both with "
            f"--annotations."
        )
    for file, entries in refs:
        for number, entry in enumerate(entries):
            yield from _phrases(entry, f"{file}, reference {number}", task, boxes, sizes)


def _phrases(
    entry: Any,
    where: str,
    task: Task[RefcocoRules],
    boxes: dict[int, list[float]],
    sizes: dict[int, tuple[int, int]],
) -> Iterator[Region]:
    sentences = take(entry, "sentences", list, where)
    task.tally.read += len(sentences)
    if take(entry, "split", str, where) != task.rules.split:
        task.tally.dropped["phrase of another split"] += len(sentences)
        return
    annotation, image_id = take(entry, "ann_id", int, where), take(entry, "image_id", int, where)
    if annotation not in boxes or image_id not in sizes:
        raise DataError(
            f"{where}: its box ({annotation}) or its image ({image_id}) is not in instances.json; "
            f"both files must be of one release. Take both anew."
        )
    x, y, width, height = boxes[annotation]
    image = image_name(task.rules.image, image_id=image_id)
    for sentence in sentences:
        phrase = clean(take(sentence, "sent", str, where))
        yield Region(image, phrase, (x, y, width, height), sizes[image_id])


def _read(
    task: Task[RefcocoRules],
) -> tuple[list[tuple[Path, list[Any]]], dict[int, list[float]], dict[int, tuple[int, int]]]:
    """The references of every file, the boxes by annotation, the sizes by image."""
    refs, boxes, sizes = [], {}, {}
    for file in task.official.files:
        content = read_refs(file)
        if isinstance(content, list):
            refs.append((file, content))
            continue
        for number, entry in enumerate(take(content, "annotations", list, str(file))):
            where = f"{file}, annotation {number}"
            box = take(entry, "bbox", list, where)
            if len(box) != 4 or not all(isinstance(value, int | float) for value in box):
                raise DataError(f"{where}: 'bbox' is {box!r}; x, y, width, height are needed.")
            boxes[take(entry, "id", int, where)] = box
        for number, entry in enumerate(take(content, "images", list, str(file))):
            where = f"{file}, image {number}"
            size = take(entry, "width", int, where), take(entry, "height", int, where)
            sizes[take(entry, "id", int, where)] = size
    return refs, boxes, sizes
