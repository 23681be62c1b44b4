"""A file of sound rows with planted defects of every kind: what `verify` must find, and no more."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

Row = dict[str, Any]
LONG = "very " * 3000


@dataclass
class Planted:
    """A JSONL file, its images, evaluation images, and (row, kind) of every defect."""

    file: Path
    images: Path
    evaluation: Path
    expected: set[tuple[int, str]] = field(default_factory=set)


def scene(seed: int, side: int) -> PIL.Image.Image:
    """A picture unlike that of any other seed: broad patches of colour with grain."""
    generator = np.random.default_rng(seed)
    patches = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    size = (side, side * 3 // 4)
    broad = PIL.Image.fromarray(patches).resize(size, PIL.Image.Resampling.BICUBIC)
    grain = generator.integers(-12, 13, (size[1], size[0], 1))
    return PIL.Image.fromarray((np.asarray(broad) + grain).clip(0, 255).astype(np.uint8))


def sound_row(number: int) -> Row:
    """Rows as mixtures hold them: with one image, text alone, two images, boxes and numbers."""
    asked = f"What is number {number}?"
    answers = [
        f"It is {number}.",
        "The years were [1999, 2001, 2003, 2005].",
        "[0.00, 0.12, 0.50, 1.00]",
        "Yes",
    ]
    turns = [("human", f"<image>\n{asked}"), ("gpt", answers[number % 4])]
    row: Row = {"id": f"r{number}", "image": f"{number}.jpg"}
    if number % 10 == 7:
        row.pop("image")
        turns[0] = ("human", asked)
    elif number % 10 == 8:
        row["image"] = [f"{number}.jpg", f"{number - 2}.jpg"]
        turns[0] = ("human", f"<image>\nand <image>\n{asked}")
    elif number % 10 == 9:
        turns += [("human", "And then?"), ("gpt", f"Then {number + 1}.")]
    row["conversations"] = [{"from": who, "value": value} for who, value in turns]
    return row


def _spoil_text(turn: int, **change: Any) -> Callable[[Row], None]:
    def spoil(row: Row) -> None:
        row["conversations"][turn].update(change)

    return spoil


def _two_questions(row: Row) -> None:
    row["conversations"].insert(1, {"from": "human", "value": "Hm?"})


def _empty_question(row: Row) -> None:
    row["conversations"] += [{"from": "human", "value": "  "}, {"from": "gpt", "value": "Yes."}]


# Of rows with one image; the kind, and what is done to a sound row.
ROW_DEFECTS: list[tuple[str, Callable[[Row], object]]] = [
    ("row", lambda row: row.pop("conversations")),
    ("row", lambda row: row.update(conversations=[])),
    ("row", _spoil_text(1, **{"from": "bot"})),
    ("row", _spoil_text(1, value=None)),
    ("row", lambda row: row.update(image=7)),
    ("slots", _spoil_text(0, value="<image><image>\nTwo?")),
    ("slots", _spoil_text(0, value="None?")),
    ("slots", _spoil_text(1, value="An <image>.")),
    ("slots", lambda row: row.pop("image")),
    ("turns", _two_questions),
    ("turns", _spoil_text(1, value=" \n")),
    ("turns", lambda row: row["conversations"].pop()),
    ("turns", _empty_question),
    ("box", _spoil_text(1, value="[0.10, 0.20, 1.30, 0.40]")),
    ("box", _spoil_text(1, value="At [0.50, 0.20, 0.30, 0.40].")),
    ("box", _spoil_text(0, value="<image>\nWhat is in [-0.1, 0.2, 0.3, 0.4]?")),
    ("tokens", _spoil_text(1, value=LONG)),
]


def _jpeg(picture: PIL.Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _turned(picture: PIL.Image.Image) -> bytes:
    exif = picture.getexif()
    exif[0x0112] = 6
    return _jpeg(picture, exif=exif)


def _bomb(_: PIL.Image.Image) -> bytes:
    header = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    return header + (60_000).to_bytes(4, "little") * 2 + b"\x01\0\x18\0" + bytes(24)


def _deep(picture: PIL.Image.Image) -> bytes:
    return _png(PIL.Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257))


# The kind, and the file that is written in place of the row's picture.
IMAGE_DEFECTS: list[tuple[str, Callable[[PIL.Image.Image], bytes | None]]] = [
    ("image_missing", lambda _: None),
    ("image_unreadable", lambda _: b""),
    ("image_unreadable", lambda picture: _jpeg(picture)[: len(_jpeg(picture)) * 2 // 3]),
    ("image_unreadable", lambda picture: _png(picture)[:-200]),
    ("image_unreadable", lambda _: b"<html><body>404 Not Found</body></html>"),
    ("image_unreadable", lambda _: b"\xff\xd8\xff\xe0 and nothing that follows"),
    ("image_size", _bomb),
    ("image_size", lambda picture: _png(picture.resize((1, 1)))),
    ("image_turned", _turned),
    ("image_mode", lambda picture: _jpeg(picture.convert("CMYK"))),
    ("image_mode", lambda picture: _png(picture.convert("RGBA"))),
    ("image_mode", _deep),
]
# (kind, file made of the picture that the row repeats)
COPIES: list[tuple[str, Callable[[PIL.Image.Image], bytes]]] = [
    ("duplicate_image", _jpeg),
    ("duplicate_image", lambda picture: _png(picture.resize((picture.width // 2, 30)))),
    ("leak", lambda picture: _jpeg(picture, quality=45)),
    ("leak", lambda picture: _jpeg(picture.resize((picture.width * 2, picture.height * 2)))),
]
KINDS_OF_ROWS = ["duplicate_row", "duplicate_id", "broken"]
ONE_OF_EACH = len(ROW_DEFECTS) + len(IMAGE_DEFECTS) + len(COPIES) + len(KINDS_OF_ROWS)


def plant(folder: Path, count: int, defects: int, *, side: int = 48) -> Planted:
    """`count` rows with `defects` defects, all kinds in turn; pictures of `side` pixels."""
    made = Planted(folder / "train.jsonl", folder / "images", folder / "evaluation")
    made.images.mkdir(parents=True)
    made.evaluation.mkdir()
    for number in range(defects):
        scene(count + number, side).save(made.evaluation / f"{number}.jpg")
    for number in range(count):
        (made.images / f"{number}.jpg").write_bytes(_jpeg(scene(number, side)))
    # Grey and palette pictures are sound.
    scene(0, side).convert("L").save(made.images / "0.jpg")
    scene(1, side).quantize().save(made.images / "1.jpg", "PNG")
    rows: list[Any] = [sound_row(number) for number in range(count)]
    # Each on a row of its own with one picture that no other row shows, far from those it repeats.
    places = [number for number in range(count // 4, count) if number % 10 in (1, 2, 3, 4, 5)]
    chosen = places[:: len(places) // defects][:defects]
    assert len(chosen) == defects
    for turn, place in enumerate(chosen):
        _spoil(made, rows, turn, place, side)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    made.file.write_text("".join(line + "\n" for line in lines))
    return made


def _spoil(made: Planted, rows: list[Any], turn: int, place: int, side: int) -> None:
    which = turn % ONE_OF_EACH
    path = made.images / f"{place}.jpg"
    for table in (ROW_DEFECTS, IMAGE_DEFECTS, COPIES):
        if which >= len(table):
            which -= len(table)
            continue
        kind, change = table[which]
        if table is ROW_DEFECTS:
            change(rows[place])  # type: ignore[arg-type]
        else:
            seed = place
            if kind == "duplicate_image":
                # A row well before, which is left as it is.
                seed = turn + 10
            elif kind == "leak":
                seed = len(rows) + turn
            data = change(scene(seed, side))  # type: ignore[arg-type]
            path.unlink() if data is None else path.write_bytes(data)  # type: ignore[arg-type]
        made.expected.add((place, kind))
        return
    kind = KINDS_OF_ROWS[which]
    if kind == "broken":
        rows[place] = json.dumps(rows[place])[:-2]
    elif kind == "duplicate_row":
        rows[place] = copy.deepcopy(rows[turn]) | {"id": f"again {place}"}
    else:
        rows[place]["id"] = rows[turn]["id"]
    made.expected.add((place, "row" if kind == "broken" else kind))
