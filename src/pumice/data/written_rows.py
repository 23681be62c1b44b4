"""A row of any source as a row of a JSON lines file: LLaVA's layout, images named as files.

Rows that name files already stay as they are written. All others are written from their sample,
and read again before they are kept: what a file of rows gives is what its sources gave.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import sha256_bytes, write_atomic
from pumice.core.images import image_header
from pumice.core.types import ImagePart, Message, Sample, TextPart
from pumice.data.row_layouts import (
    COLUMNS,
    IMAGE_KEYS,
    SLOT,
    image_entries,
    is_llava_row,
    read_sample,
)
from pumice.data.sources import LlavaJson, Source

_SUFFIX = ".images"
_SPEAKERS = {"user": "human", "assistant": "gpt"}


def stored_images(out: Path) -> Path:
    """Where the images lie that were inside the sources of a file of rows."""
    return out.with_name(out.name + _SUFFIX)


class RowWriter:
    """Gives the rows of sources as a file `out` holds them, with images named below `images`.

    An image inside its source is written to `stored_images(out)` under the hash of its bytes, so
    once however many rows show it. Used with `with`: on an error what was added goes again. What an
    earlier file of this name had stored stays, as other files may name it.
    """

    def __init__(self, out: Path, images: Path) -> None:
        self.images, self.store = images, stored_images(out)
        self.stored: set[str] = set()
        self._added: list[Path] = []

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._added:
            for path in self._added:
                path.unlink(missing_ok=True)
            if not any(self.store.iterdir()):
                self.store.rmdir()

    def row(self, source: Source, number: int) -> dict[str, Any]:
        """The row; one that cannot be read as a conversation is an error, unless it just stays."""
        content = source.content(number)
        if isinstance(source, LlavaJson) and is_llava_row(content):
            return self._moved(content, source.images_dir)
        sample = source[number]
        kept = {key: value for key, value in content.items() if key not in COLUMNS}
        return {"id": sample.id, **_written(self._named(sample)), **kept}

    def _moved(self, content: dict[str, Any], folder: Path) -> dict[str, Any]:
        if _same_place(folder, self.images) or not image_entries(content):
            return content
        key = next(key for key in IMAGE_KEYS if content.get(key) is not None)
        names = [os.path.relpath(folder / name, self.images) for name in image_entries(content)]
        return {**content, key: names if isinstance(content[key], list) else names[0]}

    def _named(self, sample: Sample) -> Sample:
        """The sample with every image as a path below `images`."""
        messages = [
            Message(
                message.role,
                tuple(
                    ImagePart(self._path(part, sample)) if isinstance(part, ImagePart) else part
                    for part in message.content
                ),
            )
            for message in sample.messages
        ]
        return replace(sample, messages=tuple(messages))

    def _path(self, part: ImagePart, sample: Sample) -> Path:
        if isinstance(part.image, Path):
            return Path(os.path.relpath(part.image, self.images))
        assert isinstance(part.image, bytes)
        header = image_header(part.image, where=f"sample {sample.id!r} ({sample.source})")
        name = f"{sha256_bytes(part.image)}.{'jpg' if header.format == 'JPEG' else header.format}"
        path = self.store / name.lower()
        if path.name not in self.stored:
            if not path.is_file():
                # Whole or not at all; one that a power cut loses is missed when it is looked for.
                write_atomic(path, part.image, sync=False)
                self._added.append(path)
            self.stored.add(path.name)
        return Path(os.path.relpath(path, self.images))


def _written(sample: Sample) -> dict[str, Any]:
    """In LLaVA's layout where that says all, else with its parts listed one by one."""
    names = [str(part.image) for part in sample.images]
    shown: dict[str, Any] = {} if not names else {"image": names[0] if len(names) == 1 else names}
    for turns in (_llava, _listed):
        row = shown | turns(sample.messages)
        try:
            again = read_sample(
                row, number=0, place="", find_image=lambda entry, _: Path(str(entry))
            )
        except DataError:
            continue
        if again.messages == sample.messages:
            return row
    raise AssertionError(f"no layout holds {sample}")


def _llava(messages: Sequence[Message]) -> dict[str, Any]:
    turns = [
        {
            "from": _SPEAKERS.get(message.role, message.role),
            "value": "".join(
                part.text if isinstance(part, TextPart) else SLOT for part in message.content
            ),
        }
        for message in messages
    ]
    return {"conversations": turns}


def _listed(messages: Sequence[Message]) -> dict[str, Any]:
    turns = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image"}
                for part in message.content
            ],
        }
        for message in messages
    ]
    return {"messages": turns}


@lru_cache(maxsize=64)
def _same_place(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
