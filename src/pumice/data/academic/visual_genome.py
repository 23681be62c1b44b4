"""Visual Genome: many short phrases a picture, of which ten are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from pumice.core.errors import DataError
from pumice.data.academic.base import Row, Task, clean, image_name, take
from pumice.data.academic.regions import Region, RegionRules, region_rows


class GenomeRules(RegionRules):
    """The rules of Visual Genome; {folder} is VG_100K or VG_100K_2, as the image's address says."""

    image: str = Field(
        "vg/{folder}/{image_id}.jpg", description="How a row names its image, below --images."
    )


def genome_rows(task: Task[GenomeRules]) -> Iterator[Row]:
    """One row an image."""
    return region_rows(_regions(task), task.rules, task.tally)


def _regions(task: Task[GenomeRules]) -> Iterator[Region]:
    lists = list(task.official.lists("region_descriptions.json"))
    pictures = _pictures(_one(lists, "url", "image_data.json"))
    file, entries = _one(lists, "regions", "region_descriptions.json")
    for number, entry in enumerate(entries):
        where = f"{file}, image {number}"
        image_id = take(entry, "id", int, where)
        if image_id not in pictures:
            raise DataError(
                f"{where}: image {image_id} is not in image_data.json; both files must be of one "
                f"release. Take both anew."
            )
        folder, size = pictures[image_id]
        image = image_name(task.rules.image, image_id=image_id, folder=folder)
        for place, region in enumerate(take(entry, "regions", list, where)):
            task.tally.read += 1
            x, y, width, height = (
                take(region, key, (int, float), f"{where}, region {place}")
                for key in ("x", "y", "width", "height")
            )
            phrase = clean(take(region, "phrase", str, f"{where}, region {place}"))
            yield Region(image, phrase, (x, y, width, height), size)


def _one(lists: list[tuple[Path, list[Any]]], key: str, usual: str) -> tuple[Path, list[Any]]:
    for file, entries in lists:
        if entries and isinstance(entries[0], dict) and key in entries[0]:
            return file, entries
    raise DataError(
        f"none of the files has entries with {key!r}; {usual} has them. Give it with --annotations."
    )


def _pictures(found: tuple[Path, list[Any]]) -> dict[int, tuple[str, tuple[int, int]]]:
    """The folder and the size of each image."""
    file, entries = found
    pictures = {}
    for number, entry in enumerate(entries):
        where = f"{file}, image {number}"
        folder = take(entry, "url", str, where).split("/")[-2:][0]
        size = take(entry, "width", int, where), take(entry, "height", int, where)
        pictures[take(entry, "image_id", int, where)] = (folder, size)
    return pictures
