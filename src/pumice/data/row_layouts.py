"""From the object of a row to its sample, in every public layout of conversations.

| key | layout |
|---|---|
| `conversations` | LLaVA: turns `{from: human or gpt, value}`; `<image>` is the place of an image |
| `messages` | chat: turns `{role, content}`; content is text as above, or a list of parts |
| `texts` | The Cauldron: `{user, assistant}` pairs; the images stand before the first |
| `caption`, `text` | an image and its caption, which answers the `question` of the source |

The images of a row stand in `image`, `images`, `file_name` or `file_names`, one or a list. Every
fault names the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pumice.core.errors import DataError
from pumice.core.types import ImagePart, Message, Part, Role, Sample, TextPart
from pumice.processing.response_formats import CAPTION

SLOT = "<image>"
ImagePlace = Literal["start", "as_written"]
FindImage = Callable[[Any, str], Path | bytes]
"""From an entry of `image` and the name of the row to the picture."""

_SPEAKERS: dict[str, Role] = {"human": "user", "gpt": "assistant"}
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
IMAGE_KEYS = ("image", "images", "file_name", "file_names")
_CAPTION_KEYS = ("caption", "text")
COLUMNS = ("id", *IMAGE_KEYS, "conversations", "messages", "texts", *_CAPTION_KEYS)
"""Every key of a row that is read."""


class SlotError(DataError):
    """The places of images in the text and the images of the row do not match."""


class Slot(NamedTuple):
    """The place of an image in a turn: of a certain one of the row, or of the next one."""

    number: int | None = None
    own: Any = None
    """The image itself, where the turn holds it."""


class Turn(NamedTuple):
    """A turn before its images are found; `given` if its parts were listed one by one."""

    role: Role
    pieces: list[str | Slot]
    given: bool = False


def read_sample(
    content: dict[str, Any],
    *,
    number: int,
    place: str,
    find_image: FindImage,
    image_place: ImagePlace = "start",
    question: str = CAPTION,
) -> Sample:
    """The sample of a row, which its `id` or `number` names; its images are not opened.

    `question` is what a bare caption answers.
    """
    name = row_name(content, number)
    where = f"sample {name!r} ({place})"
    content = _asked(content, question, where)
    turns = _layout(content, where)(content, where)
    images = [find_image(entry, where) for entry in image_entries(content)]
    _check_slots(turns, images, where)
    in_front = image_place == "start" and len(images) == 1
    left = iter(images)

    def picture(slot: Slot) -> ImagePart:
        if slot.own is not None:
            return ImagePart(find_image(slot.own, where))
        return ImagePart(next(left) if slot.number is None else images[slot.number])

    messages = [
        Message(
            turn.role,
            _at_start(turn, picture)
            if in_front and not turn.given and Slot() in turn.pieces
            else tuple(
                picture(piece) if isinstance(piece, Slot) else TextPart(piece)
                for piece in turn.pieces
                if piece != ""
            )
            # A turn without anything keeps its empty text, for whoever checks the turns.
            or (TextPart(""),),
        )
        for turn in turns
    ]
    return Sample(id=name, messages=tuple(messages), source=place)


def row_name(content: dict[str, Any], number: int) -> str:
    """The row's own id, or its number."""
    given = content.get("id")
    return str(number if given is None else given)


def image_entries(content: dict[str, Any]) -> list[Any]:
    """What a row says about its images, unchecked."""
    for key in IMAGE_KEYS:
        given = content.get(key)
        if given is not None:
            return given if isinstance(given, list) else [given]
    return []


def is_llava_row(content: dict[str, Any]) -> bool:
    """Whether a row is in LLaVA's layout and names its images as files."""
    named = all(isinstance(entry, str) for entry in image_entries(content))
    return named and content.get("conversations") is not None


def row_size(content: dict[str, Any]) -> tuple[int, int]:
    """Characters of text and number of images, without any check."""
    texts: list[Any] = []
    for key, names in (
        ("conversations", ("value",)),
        ("messages", ("content",)),
        ("texts", ("user", "assistant")),
    ):
        turns = content.get(key)
        for turn in turns if isinstance(turns, list) else []:
            texts += [turn.get(name) for name in names] if isinstance(turn, dict) else []
    texts += [content.get(key) for key in _CAPTION_KEYS]
    parts = [part.get("text") for text in texts if isinstance(text, list) for part in text]
    return sum(len(text) for text in texts + parts if isinstance(text, str)), len(
        image_entries(content)
    )


def file_image(folder: Path) -> FindImage:
    """Images that are named by a path below `folder`, or held as bytes as in parquet files."""

    def find(entry: Any, where: str) -> Path | bytes:
        if isinstance(entry, dict) and isinstance(entry.get("bytes"), bytes):
            return bytes(entry["bytes"])
        given = entry.get("path") if isinstance(entry, dict) else entry
        if isinstance(given, bytes):
            return given
        if isinstance(given, str) and given:
            return folder / given
        raise DataError(
            f"{where}: 'image' is {_shown(entry)}; allowed: a file name below the images "
            f"directory, the bytes of an image file, a list of them, or no 'image' for a row of "
            f"text. Correct the row."
        )

    return find


def _asked(content: dict[str, Any], question: str, where: str) -> dict[str, Any]:
    """A caption without a conversation as the answer to the question; other rows as they are."""
    if any(content.get(key) is not None for key in _LAYOUTS):
        return content
    caption = next((content[key] for key in _CAPTION_KEYS if key in content), None)
    if not isinstance(caption, str):
        return content
    slots = SLOT * len(image_entries(content))
    if not slots:
        raise SlotError(
            f"{where}: the row is a caption, and it has no image that the caption is of. Add the "
            f"image, or remove the row."
        )
    turns = [{"from": "human", "value": f"{slots}\n{question}"}, {"from": "gpt", "value": caption}]
    return {**content, "conversations": turns}


def _layout(content: dict[str, Any], where: str) -> Callable[[dict[str, Any], str], list[Turn]]:
    for key, layout in _LAYOUTS.items():
        given = content.get(key)
        if isinstance(given, list) and given:
            return layout
        if given is not None:
            raise _no_turns(key, repr(given)[:80], where)
    raise _no_turns("conversations", f"keys {sorted(content)}", where)


def _no_turns(key: str, given: str, where: str) -> DataError:
    return DataError(
        f"{where}: {key!r} must be a list of turns {_SHAPES[key]}, given {given}. Correct or "
        f"remove the row."
    )


def _conversations(content: dict[str, Any], where: str) -> list[Turn]:
    turns = [
        _text_turn(turn, f"{where}, turn {number}", ("from", "value"), _SPEAKERS)
        for number, turn in enumerate(content["conversations"], start=1)
    ]
    if turns[0].role != "user":
        raise DataError(
            f"{where}: the first turn is from 'gpt'; a conversation must begin with 'human'. "
            f"Remove that turn, or put the question before it."
        )
    return turns


def _messages(content: dict[str, Any], where: str) -> list[Turn]:
    turns = []
    for number, turn in enumerate(content["messages"], start=1):
        at = f"{where}, turn {number}"
        listed = isinstance(turn, dict) and isinstance(turn.get("content"), list)
        turns.append(
            _listed_turn(turn, at) if listed else _text_turn(turn, at, ("role", "content"), _ROLES)
        )
    return turns


def _texts(content: dict[str, Any], where: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, pair in enumerate(content["texts"], start=1):
        for key in ("user", "assistant"):
            value = pair.get(key) if isinstance(pair, dict) else None
            if not isinstance(value, str):
                raise DataError(
                    f"{where}, texts {number}: {key!r} must be text, given "
                    f"{type(value).__name__}. Correct or remove the row."
                )
            turns.append(Turn(_ROLES[key], [value], given=True))
    slots: list[str | Slot] = [Slot() for _ in image_entries(content)]
    first = turns[0]
    turns[0] = Turn(
        first.role, [*slots, "\n" + str(first.pieces[0])] if slots else first.pieces, True
    )
    return turns


_LAYOUTS = {"conversations": _conversations, "messages": _messages, "texts": _texts}
_SHAPES = {
    "conversations": "{'from', 'value'}",
    "messages": "{'role', 'content'}",
    "texts": "{'user', 'assistant'}",
}


def _text_turn(turn: object, where: str, keys: tuple[str, str], roles: dict[str, Role]) -> Turn:
    role, value = _speaker(turn, where, keys, roles)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {keys[1]!r} must be text, given {type(value).__name__}. Correct or remove "
            f"the row."
        )
    first, *rest = value.split(SLOT)
    pieces: list[str | Slot] = [first]
    for piece in rest:
        pieces += [Slot(), piece]
    return Turn(role, pieces)


def _speaker(
    turn: object, where: str, keys: tuple[str, str], roles: dict[str, Role]
) -> tuple[Role, Any]:
    if not isinstance(turn, dict):
        raise DataError(
            f"{where}: a turn must be an object {{{keys[0]!r}, {keys[1]!r}}}, given "
            f"{type(turn).__name__}. Correct or remove the row."
        )
    speaker = turn.get(keys[0])
    if not isinstance(speaker, str) or speaker not in roles:
        raise DataError(
            f"{where}: {keys[0]!r} is {speaker!r}; allowed: {', '.join(roles)}. Rename it, or "
            f"remove the turn."
        )
    return roles[speaker], turn.get(keys[1])


def _listed_turn(turn: object, where: str) -> Turn:
    role, parts = _speaker(turn, where, ("role", "content"), _ROLES)
    pieces: list[str | Slot] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind == "image":
            number = part.get("index")
            pieces.append(Slot(number if isinstance(number, int) else None, part.get("image")))
        else:
            raise DataError(
                f"{where}: a part of 'content' is {_shown(part)}; allowed: {{'type': 'text', "
                f"'text'}} and {{'type': 'image'}}. Correct or remove the row."
            )
    return Turn(role, pieces, given=True)


def _check_slots(turns: list[Turn], images: Sequence[Path | bytes], where: str) -> None:
    slots = [
        piece
        for turn in turns
        for piece in turn.pieces
        if isinstance(piece, Slot) and piece.own is None
    ]
    shown = ", ".join(_shown(image) for image in images)
    named = f" ({shown})" if images else ""
    for turn in turns:
        if turn.role != "user" and any(isinstance(piece, Slot) for piece in turn.pieces):
            who = "gpt" if turn.role == "assistant" else turn.role
            raise SlotError(
                f"{where}: a {who} turn holds {SLOT}, the place of an image; only human turns may, "
                f"for the {len(images)} images{named} of the row. Remove it, or write the word "
                f"another way."
            )
    numbers = sorted(slot.number for slot in slots if slot.number is not None)
    if len(slots) != len(images) or (numbers and numbers != list(range(len(images)))):
        counted = f" with the numbers {numbers}" if numbers else ""
        raise SlotError(
            f"{where}: the text has {len(slots)} {SLOT}{counted} but the row has {len(images)} "
            f"images{named}; the numbers must be equal. Add or remove {SLOT} or 'image' entries "
            f"of the row."
        )


def _at_start(turn: Turn, picture: Callable[[Slot], ImagePart]) -> tuple[Part, ...]:
    rest = "".join(piece for piece in turn.pieces if isinstance(piece, str)).strip()
    image = picture(Slot())
    return (image, TextPart(f"\n{rest}")) if rest else (image,)


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return str(value) if isinstance(value, Path) else repr(value)[:80]
