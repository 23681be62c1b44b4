"""Files of training conversations, read one row at a time; every fault names its row."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pumice.core.errors import DataError
from pumice.core.files import parse_row, read_json, sha256_file
from pumice.core.registry import check_choice
from pumice.core.types import ImagePart, Message, Part, Role, Sample, TextPart

SLOT = "<image>"
ImagePlace = Literal["start", "as_written"]
_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


class Source(Protocol):
    """Rows with numbers 0..len-1. Reading a row twice gives the same sample."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample: ...

    def size(self, row: int) -> tuple[int, int]:
        """Characters of text and number of images: a cheap measure of the row's length."""
        ...

    def fingerprint(self) -> str:
        """Changes when the rows change."""
        ...


class LlavaJson:
    """Conversations in LLaVA's format: a JSON list, or one JSON object per line.

    `image_place`: with "start", the reference's way, the one image of a row goes to the front of
    its turn; with "as_written" it stays where "<image>" is. Several images stay in any case.
    """

    def __init__(
        self, path: Path | str, images_dir: Path | str, image_place: ImagePlace = "start"
    ) -> None:
        check_choice("image_place", image_place, get_args(ImagePlace))
        self.path, self.images_dir = Path(path), Path(images_dir)
        self.image_place = image_place
        self.name = str(self.path)
        self._rows = _open_rows(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.path}, which has {len(self)} rows")
        content, place = self._rows.read(row)
        name = str(content.get("id", row))
        where = f"sample {name!r} ({place})"
        turns = _read_turns(content, where)
        images = self._image_files(content, where)
        _check_slots(turns, images, where)
        in_front = self.image_place == "start" and len(images) == 1
        left = iter(images)
        messages = [
            Message(role, _at_start(text, next(left)))
            if in_front and SLOT in text
            else Message(role, _as_written(text, [next(left) for _ in range(text.count(SLOT))]))
            for role, text in turns
        ]
        return Sample(id=name, messages=tuple(messages), source=place)

    def size(self, row: int) -> tuple[int, int]:
        """Characters of text and number of images, without any check."""
        content, _ = self._rows.read(row)
        image = content.get("image")
        images = len(image) if isinstance(image, list) else int(image is not None)
        turns = content.get("conversations")
        turns = turns if isinstance(turns, list) else []
        texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
        return sum(len(text) for text in texts if isinstance(text, str)), images

    def fingerprint(self) -> str:
        """The SHA-256 of the file."""
        return sha256_file(self.path)

    def _image_files(self, content: dict[str, Any], where: str) -> list[Path]:
        image = content.get("image")
        if image is None:
            return []
        names = image if isinstance(image, list) else [image]
        if not all(isinstance(name, str) and name for name in names):
            raise DataError(
                f"{where}: 'image' is {image!r}; allowed: a file name below the images directory, "
                f"a list of them, or no 'image' for a row of text. Correct the row."
            )
        return [self.images_dir / name for name in names]


class _ListRows:
    """The rows of a JSON list, which can only be read whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Any] = read_json(path)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> tuple[dict[str, Any], str]:
        content = self.rows[row]
        place = f"{self.path}, row {row + 1}"
        if not isinstance(content, dict):
            raise DataError(
                f"{place}: a row must be a JSON object {{...}}, given {type(content).__name__}. "
                f"Correct or remove this row."
            )
        return content, place


class _LineRows:
    """The rows of a JSONL file: their places in the file are kept, not the rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts, self.lines = array("Q"), array("Q")
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.starts.append(start)
                    self.lines.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, row: int) -> tuple[dict[str, Any], str]:
        # Opened anew each time: rows are read by several threads, which must not share a position.
        with self.path.open("rb") as file:
            file.seek(self.starts[row])
            line = file.readline()
        number = self.lines[row]
        return parse_row(line, file=self.path, line=number), f"{self.path}, line {number}"


def _open_rows(path: Path) -> _ListRows | _LineRows:
    """By content, not by the file's name: a JSON list begins with "["."""
    try:
        with path.open("rb") as file:
            head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise DataError(
            f"the data file {path} cannot be opened ({error.strerror}); a readable JSON or JSONL "
            f"file is needed. Check the path, or make the file first."
        ) from error
    rows = _ListRows(path) if head.startswith(b"[") else _LineRows(path)
    if len(rows) == 0:
        raise DataError(
            f"the data file {path} has no rows; at least one is needed. Make the file again, or "
            f"take it out of the recipe."
        )
    return rows


def _read_turns(content: dict[str, Any], where: str) -> list[tuple[Role, str]]:
    turns = content.get("conversations")
    if not isinstance(turns, list) or not turns:
        given = f"keys {sorted(content)}" if turns is None else repr(turns)[:80]
        raise DataError(
            f"{where}: 'conversations' must be a list of turns {{'from', 'value'}}, given {given}. "
            f"Correct or remove the row."
        )
    read = [_read_turn(turn, f"{where}, turn {i}") for i, turn in enumerate(turns, start=1)]
    if read[0][0] != "user":
        raise DataError(
            f"{where}: the first turn is from 'gpt'; a conversation must begin with 'human'. "
            f"Remove that turn, or put the question before it."
        )
    return read


def _read_turn(turn: object, where: str) -> tuple[Role, str]:
    if not isinstance(turn, dict):
        raise DataError(
            f"{where}: a turn must be an object {{'from', 'value'}}, given {type(turn).__name__}. "
            f"Correct or remove the row."
        )
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise DataError(
            f"{where}: 'from' is {speaker!r}; allowed: human, gpt. Rename it, or remove the turn."
        )
    if not isinstance(value, str):
        raise DataError(
            f"{where}: 'value' must be text, given {type(value).__name__}. Correct or remove the "
            f"row."
        )
    return _ROLES[speaker], value


def _check_slots(turns: list[tuple[Role, str]], images: Sequence[Path], where: str) -> None:
    slots = sum(text.count(SLOT) for role, text in turns if role == "user")
    named = f" ({', '.join(map(str, images))})" if images else ""
    if any(SLOT in text for role, text in turns if role == "assistant"):
        raise DataError(
            f"{where}: a gpt turn holds {SLOT}, the place of an image; only human turns may, for "
            f"the {len(images)} images{named} of the row. Remove it, or write the word another way."
        )
    if slots != len(images):
        raise DataError(
            f"{where}: the text has {slots} {SLOT} but the row has {len(images)} images{named}; "
            f"the numbers must be equal. Add or remove {SLOT} or 'image' entries of the row."
        )


def _at_start(text: str, image: Path) -> tuple[Part, ...]:
    rest = text.replace(SLOT, "").strip()
    return (ImagePart(image), TextPart(f"\n{rest}")) if rest else (ImagePart(image),)


def _as_written(text: str, images: Sequence[Path]) -> tuple[Part, ...]:
    if not images:
        return (TextPart(text),)
    first, *pieces = text.split(SLOT)
    parts: list[Part] = [TextPart(first)]
    for image, piece in zip(images, pieces, strict=True):
        parts += [ImagePart(image), TextPart(piece)]
    return tuple(part for part in parts if isinstance(part, ImagePart) or part.text)
