"""Training conversations, read one row at a time; every fault names its row.

The other kinds of source, and the table that says which a path is: `open_source`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

from pumice.core.registry import check_choice
from pumice.core.types import Sample
from pumice.data.blocks import Blocks
from pumice.data.row_index import RowFile
from pumice.data.row_layouts import SLOT as SLOT
from pumice.data.row_layouts import ImagePlace, file_image, read_sample, row_size
from pumice.processing.response_formats import CAPTION


class Source(Protocol):
    """Rows with numbers 0..len-1. Reading a row twice gives the same sample.

    Rows are read by several threads at a time.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample: ...

    def size(self, row: int) -> tuple[int, int]:
        """Characters of text and number of images: a cheap measure of the row's length."""
        ...

    def content(self, row: int) -> dict[str, Any]:
        """The row as it is written."""
        ...

    def place(self, row: int) -> str:
        """How errors name a row, readable or not."""
        ...

    def fingerprint(self) -> str:
        """Changes when the rows change."""
        ...


@runtime_checkable
class InBlocks(Protocol):
    """A source whose rows are read fastest near each other."""

    @property
    def blocks(self) -> Blocks: ...


class LlavaJson:
    """Conversations in a JSON list, or one JSON object per line (layouts: `row_layouts`).

    `image_place`: with "start", the reference's way, the one image of a row goes to the front of
    its turn; with "as_written" it stays where "<image>" is. Several images stay in any case.
    """

    def __init__(
        self,
        path: Path | str,
        images_dir: Path | str,
        image_place: ImagePlace = "start",
        question: str = CAPTION,
    ) -> None:
        check_choice("image_place", image_place, get_args(ImagePlace))
        self.path, self.images_dir = Path(path), Path(images_dir)
        self.image_place, self.question = image_place, question
        self.name = str(self.path)
        self.rows = RowFile(self.path)
        self._find_image = file_image(self.images_dir)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.path}, which has {len(self)} rows")
        return read_sample(
            self.rows.read(row),
            number=row,
            place=self.place(row),
            find_image=self._find_image,
            image_place=self.image_place,
            question=self.question,
        )

    def size(self, row: int) -> tuple[int, int]:
        """Characters of text and number of images, without any check."""
        return row_size(self.content(row))

    def content(self, row: int) -> dict[str, Any]:
        """The row as it is written."""
        return self.rows.read(row)

    def place(self, row: int) -> str:
        """The file and the row or line, counted from 1."""
        return self.rows.place(row)

    def fingerprint(self) -> str:
        """The SHA-256 of the file."""
        return self.rows.fingerprint()
