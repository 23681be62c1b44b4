"""Rows held out of training, chosen by the content of their images.

A picture is on one side alone, under whatever name and in however many rows: rows that share a
picture stay together. The hash of the content decides, so the choice does not depend on the order
of rows, the seed, or the number of processes. Rows without an image go by their text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pumice.core.errors import PumiceError
from pumice.core.files import cache_dir, read_json, sha256_bytes, sha256_file, write_json
from pumice.core.log import get_logger
from pumice.core.types import ImagePart, Sample
from pumice.data.blocks import Blocks, Numbers
from pumice.data.sources import InBlocks, Source

log = get_logger(__name__)
_DIGITS = 16


class Subset:
    """Some rows of a source, as a source."""

    def __init__(self, base: Source, rows: Numbers) -> None:
        self.base, self.rows = base, rows
        self.name = base.name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        return self.base[int(self.rows[row])]

    def size(self, row: int) -> tuple[int, int]:
        """Characters of text and number of images."""
        return self.base.size(int(self.rows[row]))

    def content(self, row: int) -> dict[str, Any]:
        """The row as it is written."""
        return self.base.content(int(self.rows[row]))

    def place(self, row: int) -> str:
        """How errors name a row: by its number in the whole source."""
        return self.base.place(int(self.rows[row]))

    def fingerprint(self) -> str:
        """Changes when the rows, or the choice of them, change."""
        chosen = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        return sha256_bytes(f"{self.base.fingerprint()} {chosen}".encode())


class BlockSubset(Subset):
    """Some rows of a source whose rows are read fastest near each other."""

    @property
    def blocks(self) -> Blocks:
        """The blocks of the source that still have rows."""
        assert isinstance(self.base, InBlocks)
        whole = self.base.blocks
        starts = np.unique(np.searchsorted(self.rows, whole.starts))
        return Blocks(starts[starts < len(self.rows)], whole.together)


class Split(NamedTuple):
    """The two sides of each source."""

    train: list[Subset]
    held: list[Subset]


def split_sources(sources: Sequence[Source], fraction: float) -> Split:
    """Holds out about this fraction of the pictures, with all rows that show them."""
    keys = [_keys_of_rows(source) for source in sources]
    roots = _roots([row for rows in keys for row in rows])
    limit = int(fraction * 16**_DIGITS)
    train: list[Subset] = []
    held: list[Subset] = []
    for source, rows in zip(sources, keys, strict=True):
        out = np.array([int(roots[row[0]], 16) < limit for row in rows], dtype=bool)
        kind = BlockSubset if isinstance(source, InBlocks) else Subset
        train.append(kind(source, np.flatnonzero(~out)))
        held.append(kind(source, np.flatnonzero(out)))
    counts = sum(map(len, train)), sum(map(len, held))
    if not all(counts) or not all(map(len, train)):
        raise PumiceError(
            f"validation.fraction {fraction:g} leaves {counts[0]} rows to train on and {counts[1]} "
            f"to validate with; each source must keep some to train on, and some must be held out. "
            f"Change the fraction, or set validation to null."
        )
    log.info("validation: %d of %d rows are held out", counts[1], sum(counts))
    return Split(train, held)


def image_key(part: ImagePart) -> str:
    """A name for exactly this image's content."""
    image = part.image
    if isinstance(image, Path):
        return sha256_file(image)[:_DIGITS]
    data = image if isinstance(image, bytes) else image.tobytes()
    return sha256_bytes(data)[:_DIGITS]


def _keys_of_rows(source: Source) -> list[list[str]]:
    """The keys of each row's images, or one of its text; computed once and kept."""
    file = cache_dir() / "held_out" / f"{sha256_bytes(source.fingerprint().encode())[:24]}.json"
    if file.is_file():
        known: list[list[str]] = read_json(file)
        if len(known) == len(source):
            return known
    log.info("validation: reading the images of %s once, to tell them apart", source.name)
    of_file: dict[Path, str] = {}
    keys = [_keys(source[row], of_file) for row in range(len(source))]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, keys)
    except OSError as error:
        log.warning("the hashes of images cannot be kept in %s (%s)", file, error)
    return keys


def _keys(sample: Sample, of_file: dict[Path, str]) -> list[str]:
    if not sample.images:
        text = json.dumps([message.text for message in sample.messages])
        return [sha256_bytes(text.encode())[:_DIGITS]]
    keys = []
    for part in sample.images:
        if isinstance(part.image, Path):
            if part.image not in of_file:
                of_file[part.image] = image_key(part)
            keys.append(of_file[part.image])
        else:
            keys.append(image_key(part))
    return keys


def _roots(rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """Each key with the smallest of those it is joined to by rows that show several."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row in rows:
        first = find(row[0])
        for key in row[1:]:
            one, other = sorted((first, find(key)))
            parent[other] = one
            first = one
    return {key: find(key) for key in list(parent)}
