"""WebDataset shards: tar files in which the members of a sample stand one after the other.

`000.jpg` and `000.json` are one sample, named by what stands before the first dot. Each shard is
gone through once, from header to header, and the place of every sample is kept; so a row is one
read at one place, any row can be read at any time, and a run resumes to the sample. Shards are
`Blocks`: an epoch goes through a few at a time.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from pumice.core.errors import DataError
from pumice.core.files import parse_json, sha256_bytes, sha256_ends
from pumice.core.log import get_logger
from pumice.core.types import Sample
from pumice.data.blocks import Blocks
from pumice.data.kept_places import Places, kept_places
from pumice.data.row_layouts import image_entries, read_sample, row_size
from pumice.processing.response_formats import CAPTION

log = get_logger(__name__)

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
KEPT_FROM = 2**20
# So many shards are read at a time: enough to mix, few enough to be read in long pieces.
_TOGETHER = 16


class TarShards:
    """The samples of tar shards: an image or several, and `json` (a row) or `txt` (a caption)."""

    def __init__(self, shards: Sequence[Path], name: str, question: str = CAPTION) -> None:
        self.shards, self.name, self.question = list(shards), name, question
        found = [kept_places(path, _find, _digest, KEPT_FROM) for path in self.shards]
        self._places = [places for places, _ in found]
        self._digests = [
            made or _digest(path) for path, (_, made) in zip(shards, found, strict=True)
        ]
        counts = [len(places) for places in self._places]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def blocks(self) -> Blocks:
        """Each shard is a block."""
        return Blocks(self._starts[:-1], _TOGETHER)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Sample:
        members, place = self._members(row)
        content = self._content(members, place)
        pictures = _pictures(members)

        def find(entry: Any, where: str) -> bytes:
            return _picture(entry, pictures, image_entries(content), where)

        return read_sample(
            content, number=row, place=place, find_image=find, question=self.question
        )

    def size(self, row: int) -> tuple[int, int]:
        """Characters of text and number of images."""
        return row_size(self._content(*self._members(row)))

    def content(self, row: int) -> dict[str, Any]:
        """The row as it is written, with the names of its images."""
        return self._content(*self._members(row))

    def place(self, row: int) -> str:
        """The shard and the sample's number in it, counted from 1."""
        shard = self._shard(row)
        return f"{self.shards[shard]}, sample {row - int(self._starts[shard]) + 1} of it"

    def fingerprint(self) -> str:
        """Of the shards' sizes, ends and the places of their samples."""
        return sha256_bytes(json.dumps(self._digests).encode())

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _members(self, row: int) -> tuple[dict[str, bytes], str]:
        """The files of a sample by what follows its key, and how errors name it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.name}, which has {len(self)} rows")
        shard = self._shard(row)
        begin, end = (int(n) for n in self._places[shard][row - int(self._starts[shard])])
        path = self.shards[shard]
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        members: dict[str, bytes] = {}
        key = ""
        with _opened(path, io.BytesIO(data)) as tar:
            for member in tar:
                parts = _key(member.name)
                held = tar.extractfile(member) if member.isfile() and parts else None
                if held is not None and parts is not None:
                    key = parts[0]
                    if parts[1] in members:
                        raise DataError(
                            f"{path}, sample {key!r}: two members end in {parts[1]!r}; each may "
                            f"stand once. Make the shard again."
                        )
                    members[parts[1]] = held.read()
        return members, f"{path}, sample {key}"

    def _content(self, members: dict[str, bytes], place: str) -> dict[str, Any]:
        given = parse_json(members["json"], file=Path(place)) if "json" in members else {}
        if not isinstance(given, dict):
            raise DataError(
                f"{place}: its json must be an object {{...}}, given {type(given).__name__}. "
                f"Correct or remove the sample."
            )
        row: dict[str, Any] = dict(given)
        row.setdefault("id", PurePosixPath(place.rpartition(" ")[2]).name)
        if "txt" in members:
            row.setdefault("caption", _caption(members["txt"], place))
        if not image_entries(row) and (pictures := _pictures(members)):
            row["images"] = list(pictures)
        return row


def _caption(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start} of its txt is not UTF-8 text; captions must be UTF-8. "
            f"Make the shard again."
        ) from error


def _pictures(members: dict[str, bytes]) -> dict[str, bytes]:
    """The images of a sample in the order of their names, numbers by value."""
    names = [name for name in members if name.rpartition(".")[2] in PICTURES]
    names.sort(key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    return {name: members[name] for name in names}


def _picture(entry: Any, pictures: dict[str, bytes], entries: list[Any], where: str) -> bytes:
    """An entry of `image` names a member by its end; else the members stand in its order."""
    if isinstance(entry, str):
        for name in (entry, PurePosixPath(entry).name.partition(".")[2].lower()):
            if name in pictures and (name == entry or len(entries) == 1):
                return pictures[name]
    if len(entries) == len(pictures):
        return list(pictures.values())[entries.index(entry)]
    raise DataError(
        f"{where}: the row names {len(entries)} images and the shard holds {len(pictures)} for it "
        f"({', '.join(pictures) or 'none'}); the numbers must be equal. Make the shard again."
    )


def _key(name: str) -> tuple[str, str] | None:
    """The sample's key and what follows it; None for a member that belongs to no sample."""
    folder, _, base = name.rpartition("/")
    stem, dot, end = base.partition(".")
    if not stem or not dot or not end:
        return None
    return f"{folder}/{stem}" if folder else stem, end.lower()


def _find(path: Path) -> Places:
    """uint64[samples, 2]: where each sample begins and ends; only headers are read."""
    places: list[tuple[int, int]] = []
    key, begin, end, passed = None, 0, 0, []
    with path.open("rb") as file, _opened(path, file) as tar:
        for member in _each(tar, path):
            parts = _key(member.name) if member.isfile() else None
            if parts is None or parts[0] != key:
                if key is not None:
                    places.append((begin, end))
                key, begin = (parts[0] if parts else None), member.offset
            if parts is None and member.isfile():
                passed.append(member.name)
            end = member.offset_data + -(-member.size // 512) * 512
        if key is not None:
            places.append((begin, end))
        _check_end(file, end, path)
    if passed:
        log.warning("%s: %d members belong to no sample, such as %r", path, len(passed), passed[0])
    return np.array(places, dtype=np.uint64).reshape(-1, 2)


def _check_end(file: BinaryIO, end: int, path: Path) -> None:
    """A tar file ends in zeros; without this check one that was cut just has fewer samples."""
    file.seek(0, io.SEEK_END)
    if file.tell() < end + 512:
        raise _cut(path, "it was cut: its end mark is missing")
    file.seek(end)
    while piece := file.read(2**20):
        if piece.count(0) < len(piece):
            raise _cut(path, "it goes on after its end mark, as joined tar files do: split it")


def _each(tar: tarfile.TarFile, path: Path) -> Iterable[tarfile.TarInfo]:
    try:
        while (member := tar.next()) is not None:
            # tarfile keeps every member it has seen; a shard may have a hundred thousand.
            tar.members = []  # type: ignore[attr-defined]
            yield member
    except tarfile.TarError as error:
        raise _cut(path, str(error)) from error


def _opened(path: Path, file: Any) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        file.seek(0)
        packed = file.read(2) == b"\x1f\x8b"
        raise _cut(
            path, "it is compressed: unpack it with gunzip" if packed else str(error)
        ) from error


def _cut(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} cannot be read as a tar shard ({what}); a whole, uncompressed tar file is needed. "
        f"Download or make the shard again."
    )


def _digest(path: Path) -> str:
    return f"{path.name} {sha256_ends(path)}"
