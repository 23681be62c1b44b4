"""Image folders: pictures, and their captions in `metadata.jsonl`, `metadata.csv` or `.txt` files.

`metadata` is laid out as Hugging Face's ImageFolder: `file_name` (or `file_names`) beside `text`
or `caption`. Without it, each picture has its caption in a `.txt` file of its own name.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError, some_of
from pumice.core.files import sha256_bytes
from pumice.core.types import Sample
from pumice.data.row_layouts import file_image, read_sample, row_size
from pumice.data.tar_source import PICTURES
from pumice.processing.response_formats import CAPTION


class ImageFolder:
    """Pictures with captions in a CSV table or in a text file each; every caption is a row."""

    def __init__(self, folder: Path, question: str = CAPTION) -> None:
        self.folder, self.name, self.question = folder, str(folder), question
        self._find_image = file_image(folder)
        table = folder / "metadata.csv"
        self._rows = _table_rows(table) if table.is_file() else _text_rows(folder)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.folder}, which has {len(self)} rows")
        return read_sample(
            self.content(row),
            number=row,
            place=self.place(row),
            find_image=self._find_image,
            question=self.question,
        )

    def place(self, row: int) -> str:
        """The row, counted from 1."""
        return f"{self.folder}, row {row + 1}"

    def size(self, row: int) -> tuple[int, int]:
        """Characters of text and number of images."""
        return row_size(self.content(row))

    def content(self, row: int) -> dict[str, Any]:
        """The row as an object."""
        return self._rows[row]

    def fingerprint(self) -> str:
        """Of all names and captions, not of the pictures."""
        return sha256_bytes(json.dumps(self._rows).encode())


def is_image_folder(path: Path) -> bool:
    """Whether a directory holds pictures, or a table that names them."""
    return any((path / f"metadata.{end}").is_file() for end in ("jsonl", "csv")) or any(
        _is_picture(entry) for entry in path.rglob("*")
    )


def _is_picture(path: Path) -> bool:
    return path.suffix[1:].lower() in PICTURES


def _table_rows(path: Path) -> list[dict[str, Any]]:
    # The whole process has one limit, and whoever else reads tables raises it, too.
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from error
    if not rows or "file_name" not in rows[0] or not {"text", "caption"} & set(rows[0]):
        given = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise DataError(
            f"{path} has {given}; rows with the columns file_name and text (or caption) are "
            f"needed. Rename its columns."
        )
    return rows


def _text_rows(folder: Path) -> list[dict[str, Any]]:
    pictures = sorted(path for path in folder.rglob("*") if _is_picture(path))
    alone = [path.name for path in pictures if not path.with_suffix(".txt").is_file()]
    if alone or not pictures:
        raise DataError(
            f"{folder}: {len(alone)} of {len(pictures)} pictures have no caption"
            f"{': ' if alone else ''}{some_of(alone)}. "
            f"A metadata.jsonl (file_name, text), a metadata.csv, or a .txt file beside each "
            f"picture is needed. Add them."
        )
    return [
        {
            "id": str(path.relative_to(folder)),
            "image": str(path.relative_to(folder)),
            "caption": _caption(path.with_suffix(".txt")),
        }
        for path in pictures
    ]


def _caption(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from error


def _no_text(path: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path}: byte {error.start} is not UTF-8 text; captions must be UTF-8. Save the file "
        f"again as UTF-8."
    )
