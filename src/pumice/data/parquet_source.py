"""Parquet files and saved Hugging Face datasets, with their images inside or beside them.

Columns are those of `row_layouts`; others are not read. A parquet file is read one row group at a
time, and a few are kept; a saved dataset is mapped into memory by `datasets`.
"""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import sha256_bytes, sha256_ends
from pumice.core.log import get_logger
from pumice.core.types import Sample
from pumice.data.blocks import Blocks
from pumice.data.row_layouts import COLUMNS, file_image, read_sample, row_size
from pumice.processing.response_formats import CAPTION

log = get_logger(__name__)

# Row groups mixed at a time, and kept: those of this moment and of the next.
_TOGETHER, _KEPT = 8, 16
_LARGE = 2**28


class Table(ABC):
    """What parquet files and saved datasets share: a row is an object, its images are inside."""

    def __init__(self, name: str, images_dir: Path, question: str) -> None:
        self.name, self.question = name, question
        self._find_image = file_image(images_dir)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def content(self, row: int) -> dict[str, Any]:
        """The row as it is written; images are their encoded bytes."""

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.name}, which has {len(self)} rows")
        return read_sample(
            self.content(row),
            number=row,
            place=self.place(row),
            find_image=self._find_image,
            question=self.question,
        )

    def place(self, row: int) -> str:
        """The row, counted from 1."""
        return f"{self.name}, row {row + 1}"

    def size(self, row: int) -> tuple[int, int]:
        """Characters of text and number of images."""
        return row_size(self.content(row))


class ParquetFiles(Table):
    """The rows of parquet files, one after the other."""

    def __init__(
        self, files: Sequence[Path], name: str, images_dir: Path, question: str = CAPTION
    ) -> None:
        super().__init__(name, images_dir, question)
        self._files = list(files)
        self._groups: list[tuple[int, int]] = []
        starts = [0]
        for number, path in enumerate(self._files):
            for group, rows, size in _row_groups(path):
                self._groups.append((number, group))
                starts.append(starts[-1] + rows)
                if size > _LARGE:
                    log.warning(
                        "%s: a row group of %.1f GB is read whole for each of its rows; write the "
                        "file with row groups of about 100 rows",
                        path,
                        size / 1e9,
                    )
        self._starts = np.array(starts)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._locks = [threading.Lock() for _ in self._groups]
        self._lock = threading.Lock()

    @property
    def blocks(self) -> Blocks:
        """Each row group is a block."""
        return Blocks(self._starts[:-1], _TOGETHER)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def content(self, row: int) -> dict[str, Any]:
        """The row as it is written; images are their encoded bytes."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        table = self._group(group)
        found: dict[str, Any] = table.slice(row - int(self._starts[group]), 1).to_pylist()[0]
        return found

    def fingerprint(self) -> str:
        """Of the files' sizes and ends; a parquet file ends with the places of all its columns."""
        return _fingerprint(self._files)

    def _group(self, group: int) -> Any:
        # One thread reads a group, the others that need it wait for it.
        with self._locks[group]:
            with self._lock:
                if group in self._kept:
                    self._kept.move_to_end(group)
                    return self._kept[group]
            number, place = self._groups[group]
            file = _pyarrow().parquet.ParquetFile(self._files[number], memory_map=True)
            with file:
                columns = [name for name in file.schema_arrow.names if name in COLUMNS]
                table = file.read_row_group(place, columns=columns, use_threads=False)
            with self._lock:
                self._kept[group] = table
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return table


class SavedDataset(Table):
    """A dataset that `datasets` wrote with `save_to_disk`."""

    def __init__(self, folder: Path, name: str, images_dir: Path, question: str = CAPTION) -> None:
        super().__init__(name, images_dir, question)
        datasets = _datasets()
        try:
            loaded = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} cannot be read as a dataset written by save_to_disk ({error!r:.200}); a "
                f"whole one is needed. Download or make it again."
            ) from error
        if isinstance(loaded, datasets.DatasetDict):
            splits = ", ".join(loaded)
            raise DataError(
                f"{folder} holds a dataset of several splits ({splits}); one is needed. Give "
                f"{folder / next(iter(loaded))}."
            )
        columns = [column for column in loaded.column_names if column in COLUMNS]
        # Arrow, so that images stay the bytes they are and are decoded by one place of ours.
        self._rows = loaded.select_columns(columns).with_format("arrow")
        self._folder = folder

    def __len__(self) -> int:
        return len(self._rows)

    def content(self, row: int) -> dict[str, Any]:
        """The row as it is written; images are their encoded bytes."""
        found: dict[str, Any] = self._rows[row : row + 1].to_pylist()[0]
        return found

    def fingerprint(self) -> str:
        """Of the sizes and ends of its files."""
        return _fingerprint(sorted(self._folder.glob("*.arrow")))


def _row_groups(path: Path) -> list[tuple[int, int, int]]:
    """(number, rows, bytes) of every row group."""
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            if not set(COLUMNS) & set(file.schema_arrow.names):
                raise DataError(
                    f"{path} has the columns {', '.join(file.schema_arrow.names)}; some of "
                    f"{', '.join(COLUMNS)} are needed. Rename its columns."
                )
            groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as a parquet file ({error}); a whole one is needed. Download "
            f"or make it again."
        ) from error
    return [(k, group.num_rows, group.total_byte_size) for k, group in enumerate(groups)]


def _fingerprint(files: Sequence[Path]) -> str:
    return sha256_bytes(json.dumps([sha256_ends(path) for path in files]).encode())


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise _missing("parquet files", "pyarrow") from error
    return pyarrow


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _missing("saved Hugging Face datasets", "datasets") from error
    return datasets


def _missing(what: str, package: str) -> PumiceError:
    return PumiceError(
        f"{what} need the package {package}, which is not installed. Install pumice[data], or "
        f"write the rows as JSONL."
    )
