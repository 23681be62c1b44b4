"""Several sources written as one file of rows; counts are checked, ids are hashed.

The rows are those of the first epoch of a `Mixture`, in its order. Beside the file lies its record,
and the images that were inside the sources.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import HALVES, read_json, sha256_bytes, sha256_file, write_json
from pumice.core.progress import progress
from pumice.data.mixture import Mixture, Part
from pumice.data.row_layouts import image_entries, row_name
from pumice.data.sources import Source
from pumice.data.written_rows import RowWriter

_SUFFIX = ".mix.json"
WHOLE = "the whole mixture"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Counts that must come out; None is not checked, `folders` by the start of an image's name."""

    rows: int | None = None
    with_image: int | None = None
    without_image: int | None = None
    images: int | None = None
    folders: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixPart:
    """A source of a mixture, and how much of it is taken."""

    name: str
    source: Source
    weight: float | None = None
    cap: int | None = None
    epochs: int = 1
    expected: Expected | None = None


@dataclass(slots=True)
class Counts:
    """What came out, of a source or of all."""

    rows: int = 0
    with_image: int = 0
    without_image: int = 0
    names: set[str] = field(default_factory=set)
    folders: Counter[str] = field(default_factory=Counter)

    def add(self, images: list[str]) -> None:
        """Count a row with these images."""
        self.rows += 1
        self.with_image += bool(images)
        self.without_image += not images
        self.names.update(images)
        if images:
            self.folders[os.path.dirname(images[0])] += 1

    def told(self) -> dict[str, Any]:
        """For the record."""
        return {
            "rows": self.rows,
            "with_image": self.with_image,
            "without_image": self.without_image,
            "images": len(self.names),
            "folders": dict(sorted(self.folders.items())),
        }

    def below(self, folder: str) -> int:
        """Rows whose first image lies in this folder or deeper."""
        return sum(n for name, n in self.folders.items() if f"{name}/".startswith(f"{folder}/"))


def write_mix(
    parts: Sequence[MixPart],
    out: Path,
    *,
    name: str,
    seed: int,
    images: Path,
    expected: Expected | None = None,
    accept: Collection[str] = (),
) -> dict[str, Any]:
    """Write the rows of one epoch to `out` as JSON lines and give the record.

    Images are named below `images`; those inside a source are written out. A count that is not the
    expected one is an error, and nothing is written; `accept` names sources whose counts may
    differ, which the record says.
    """
    unknown = sorted(set(accept) - {part.name for part in parts})
    if unknown:
        raise PumiceError(
            f"--accept {unknown[0]} is no source of {name}; its sources are "
            f"{', '.join(part.name for part in parts)}."
        )
    for part in parts:
        if Path(part.source.name).resolve() == out.resolve():
            raise PumiceError(f"--out {out} is a source of {name} itself; give another name.")
    mixture = Mixture([Part(p.source, p.weight, p.cap, p.epochs) for p in parts], seed)
    checked = [part for part in parts if part.expected and part.name not in accept]
    # The numbers of rows are known before any is read.
    counted = dict(zip((part.name for part in parts), mixture.counts, strict=True))
    _refuse(
        name,
        [
            f
            for p in checked
            for f in _differing(p.name, p.expected, {_WORDS["rows"]: counted[p.name]})
        ],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    part_file = out.with_name(f".{out.name}.part")
    with RowWriter(out, images) as writer:
        mixed = _Mixed(parts, mixture, writer)
        try:
            with part_file.open("w", encoding="utf-8", errors=HALVES) as file:
                file.writelines(mixed.lines())
            _refuse(name, mixed.differing(checked, None if accept else expected))
            part_file.replace(out)
        finally:
            part_file.unlink(missing_ok=True)
    record = {"mixture": name, "seed": seed, "out": out.name, "sha256": sha256_file(out)}
    record |= mixed.record(accept) | {"images_written": len(writer.stored)}
    write_json(record_path(out), record)
    return record


def record_path(out: Path) -> Path:
    """Where the record of a mixed file lies."""
    return out.with_name(out.name + _SUFFIX)


def read_record(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The record of a mixed file; None without one, or if the file changed since."""
    if not record_path(path).is_file():
        return None
    record: dict[str, Any] = read_json(record_path(path))
    return record if record.get("sha256") == fingerprint else None


class _Mixed:
    """The rows of a mixture on their way into a file, counted."""

    def __init__(self, parts: Sequence[MixPart], mixture: Mixture, writer: RowWriter) -> None:
        self.parts, self.mixture, self.writer = parts, mixture, writer
        self.counts = [Counts() for _ in parts]
        self.ids: list[str] = []

    def lines(self) -> Iterator[str]:
        with progress(len(self.mixture), "mixing") as bar:
            for index, row in self.mixture.order(0):
                part = self.parts[index]
                content = self.writer.row(part.source, row)
                self.ids.append(f"{part.name}\t{row_name(content, row)}")
                self.counts[index].add(image_entries(content))
                bar.update()
                yield json.dumps({**content, "source": part.name}, ensure_ascii=False) + "\n"

    def differing(self, checked: Collection[MixPart], expected: Expected | None) -> list[str]:
        """Every expected count that did not come out."""
        found: list[str] = []
        for part, counts in zip(self.parts, self.counts, strict=True):
            if part in checked:
                found += _differing(part.name, part.expected, _numbers(counts, part.expected))
        whole = self._whole()
        return found + _differing(WHOLE, expected, _numbers(whole, expected))

    def record(self, accept: Collection[str]) -> dict[str, Any]:
        """What came out. The hash of the ids says which rows were chosen, in whatever order."""
        sources = {
            part.name: {
                "path": Path(part.source.name).name,
                "sha256": part.source.fingerprint(),
                "rows_there": len(part.source),
                "weight": part.weight,
                "cap": part.cap,
                "epochs": part.epochs,
                **counts.told(),
                "expected": part.expected and asdict(part.expected),
                "accepted": part.name in accept,
            }
            for part, counts in zip(self.parts, self.counts, strict=True)
        }
        whole = self._whole().told()
        del whole["folders"]
        ids = sha256_bytes("\n".join(sorted(self.ids)).encode("utf-8", HALVES))
        return {**whole, "ids_sha256": ids, "sources": sources}

    def _whole(self) -> Counts:
        whole = Counts()
        for counts in self.counts:
            whole.rows += counts.rows
            whole.with_image += counts.with_image
            whole.without_image += counts.without_image
            whole.names |= counts.names
            whole.folders += counts.folders
        return whole


def _numbers(counts: Counts, expected: Expected | None) -> dict[str, int]:
    """The counts that are expected, by how they are told."""
    folders = {} if expected is None else expected.folders
    told = {_WORDS[key]: value for key, value in counts.told().items() if key in _WORDS}
    return told | {_rows_below(folder): counts.below(folder) for folder in folders}


def _differing(name: str, expected: Expected | None, found: dict[str, int]) -> list[str]:
    """A sentence for each count that is another than expected, among those that are known."""
    if expected is None:
        return []
    # Told apart by their words: a folder may be called `images` or `rows` as well.
    wanted = {words: getattr(expected, key) for key, words in _WORDS.items()}
    wanted |= {_rows_below(folder): value for folder, value in expected.folders.items()}
    return [
        f"{name} has {found[words]:,} {words}, expected {value:,}"
        for words, value in wanted.items()
        if value is not None and words in found and found[words] != value
    ]


def _rows_below(folder: str) -> str:
    return f"rows with images below {folder}"


_WORDS = {
    "rows": "rows",
    "with_image": "rows with an image",
    "without_image": "rows without an image",
    "images": "different images",
}


def _refuse(name: str, faults: list[str]) -> None:
    if faults:
        raise DataError(
            f"mixture {name} does not come out: {'; '.join(faults)}. Make the sources again, or "
            f"accept the counts of a source with --accept NAME, which is recorded."
        )
