"""Reads a SentencePiece model file (tokenizer.model) without the sentencepiece package.

The file is one protocol-buffer message; the few fields that decide how text is cut are read here.
Field numbers are those of the published sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pumice.core.errors import PumiceError

Kind = Literal["normal", "unknown", "control", "user", "unused", "byte"]
_KINDS: dict[int, Kind] = {
    1: "normal",
    2: "unknown",
    3: "control",
    4: "user",
    5: "unused",
    6: "byte",
}
_MODELS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Value = int | bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a tokenizer.model says: its pieces by id, and how text is made ready for them."""

    pieces: tuple[Piece, ...]
    algorithm: str
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    character_map: bytes
    unk_id: int
    bos_id: int
    eos_id: int


def read_model(path: Path) -> SentencePieceModel:
    """The model in `path`; a file of another kind or a truncated one is a PumiceError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PumiceError(
            f"tokenizer file {path} cannot be read: {error.strerror}. Check the path and its "
            "permissions."
        ) from error
    try:
        model = _parse(data)
    except (ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise _not_a_model(path, str(error)) from error
    if not model.pieces or not any(piece.kind == "unknown" for piece in model.pieces):
        raise _not_a_model(path, "it holds no pieces, or none for unknown text")
    return model


def _not_a_model(path: Path, reason: str) -> PumiceError:
    return PumiceError(
        f"{path} is not a whole SentencePiece model ({reason}). Fetch it again, or give a "
        "directory with tokenizer.json."
    )


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    return SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=_MODELS[_number(trainer, 3, 1)],
        byte_fallback=bool(_number(trainer, 35, 0)),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
        character_map=_message(normalizer.get(2, b"")),
        unk_id=_number(trainer, 40, 0),
        bos_id=_number(trainer, 41, 1),
        eos_id=_number(trainer, 42, 2),
    )


def _piece(data: bytes) -> Piece:
    values = dict(_fields(data))
    (score,) = struct.unpack("<f", _message(values.get(2, bytes(4))))
    return Piece(_message(values[1]).decode("utf-8"), score, _KINDS[_number(values, 3, 1)])


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The numbered fields of a message: whole numbers, or the bytes of anything else."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            whole, place = _varint(data, place)
            yield number, whole
            continue
        if wire == _BYTES:
            length, place = _varint(data, place)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown wire type {wire}")
        if number == 0 or place + length > len(data):
            raise ValueError(f"field {number} reaches beyond the end")
        yield number, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            # Negative numbers (an id of -1 is "none") are written as 64-bit two's complement.
            return (value - (1 << 64) if value >= 1 << 63 else value), place
    raise ValueError("a number of more than ten bytes")


def _message(value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    raise ValueError("a number stands where bytes are expected")


def _number(values: dict[int, Value], key: int, default: int) -> int:
    value = values.get(key, default)
    if isinstance(value, int):
        return value
    raise ValueError("bytes stand where a number is expected")
