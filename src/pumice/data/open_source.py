"""One table that says which kind of source a path is, and opens it.

A path is a file, a directory, or a pattern of files: `shards/{000..127}.tar`, `data/*.parquet`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pumice.core.errors import DataError
from pumice.core.files import entries_of
from pumice.core.registry import Registry
from pumice.data.folder_source import ImageFolder, is_image_folder
from pumice.data.parquet_source import ParquetFiles, SavedDataset
from pumice.data.sources import LlavaJson, Source
from pumice.data.tar_source import TarShards
from pumice.processing.response_formats import CAPTION

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TAR_MAGIC = 257


class Found(NamedTuple):
    """A path that was looked at: its files (those of a directory or a pattern), and its settings.

    `images` is the directory of images that rows name; `head` the first bytes of the first file.
    """

    path: Path
    files: list[Path]
    head: bytes
    images: Path
    question: str


class Kind(NamedTuple):
    """A kind of source: whether a path is one, and how it is opened."""

    about: str
    fits: Callable[[Found], bool]
    open: Callable[[Found], Source]


def _ending(found: Found, end: str) -> list[Path]:
    return [path for path in found.files if path.suffix == end]


SOURCES: Registry[Kind] = Registry(
    "kind of data",
    {
        "dataset": Kind(
            "a Hugging Face dataset written by save_to_disk",
            lambda f: any((f.path / n).is_file() for n in ("state.json", "dataset_dict.json")),
            lambda f: SavedDataset(f.path, str(f.path), f.images, f.question),
        ),
        "parquet": Kind(
            "parquet files",
            lambda f: f.head.startswith(b"PAR1") or bool(_ending(f, ".parquet")),
            lambda f: ParquetFiles(
                _ending(f, ".parquet") or f.files, str(f.path), f.images, f.question
            ),
        ),
        "tar": Kind(
            "WebDataset tar shards",
            lambda f: (
                f.head[_TAR_MAGIC:].startswith(b"ustar")
                or f.head.startswith(b"\x1f\x8b")
                or bool(_ending(f, ".tar"))
            ),
            lambda f: TarShards(_ending(f, ".tar") or f.files, str(f.path), f.question),
        ),
        "folder": Kind(
            "pictures with captions",
            lambda f: f.path.is_dir() and is_image_folder(f.path),
            lambda f: _folder(f),
        ),
        "json": Kind(
            "rows in a JSON list or JSON lines",
            lambda f: not f.path.is_dir(),
            lambda f: LlavaJson(f.path, f.images, question=f.question),
        ),
    },
)


def open_source(
    path: Path | str,
    images: Path | str | None = None,
    *,
    kind: str | None = None,
    question: str | None = None,
) -> Source:
    """The rows of a path of any kind; `images` left out is the directory the path lies in.

    `kind` is a name of `SOURCES`; left out, the content decides. `question` is what a caption
    without a conversation answers.
    """
    path = Path(path)
    files = _files(path)
    found = Found(
        path,
        files,
        _head(files[0]) if files and not path.is_dir() else b"",
        _home(path) if images is None else Path(images),
        CAPTION if question is None else question,
    )
    source = SOURCES[kind_of(found) if kind is None else kind].open(found)
    if len(source) == 0:
        raise DataError(
            f"{path} has no rows; at least one is needed. Make it again, or take it out of the "
            f"recipe."
        )
    return source


def kind_of(found: Found) -> str:
    """The first kind of the table that fits."""
    for name in SOURCES:
        if SOURCES[name].fits(found):
            return name
    kinds = "; ".join(f"{name} ({SOURCES[name].about})" for name in SOURCES)
    raise DataError(
        f"{found.path} holds no training data that is known: it holds {entries_of(found.path)}. "
        f"Allowed: {kinds}. Give a file or directory of one of them."
    )


def is_pattern(path: Path | str) -> bool:
    """Whether a path stands for several files."""
    text = str(path)
    return not Path(path).exists() and (bool(_RANGE.search(text)) or glob.has_magic(text))


def missing_files(path: Path | str) -> list[str]:
    """The parts of a path that are not there: the path itself, or what its pattern asks for."""
    if not is_pattern(path):
        return [] if Path(path).exists() else [str(path)]
    return [part for part in _spelled_out(str(path)) if not glob.glob(part, recursive=True)]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(entry for end in ("*.parquet", "*.tar") for entry in path.rglob(end))
    if not is_pattern(path):
        return [path]
    missing = missing_files(path)
    if missing:
        raise DataError(
            f"no file is named {', '.join(missing)}, as {path} asks for; every part of a pattern "
            f"must be there. Check the path, or download what is missing."
        )
    parts = _spelled_out(str(path))
    return [Path(name) for part in parts for name in sorted(glob.glob(part, recursive=True))]


def _spelled_out(pattern: str) -> list[str]:
    """Every number of every range {000..127}, with the zeros its ends are written with."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    before, after = pattern[: found.start()], pattern[found.end() :]
    numbers = range(int(first), int(last) + 1)
    return [p for n in numbers for p in _spelled_out(f"{before}{n:0{len(first)}}{after}")]


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(512)


def _home(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _folder(found: Found) -> Source:
    table = found.path / "metadata.jsonl"
    if table.is_file():
        return LlavaJson(table, found.path, question=found.question)
    return ImageFolder(found.path, found.question)
