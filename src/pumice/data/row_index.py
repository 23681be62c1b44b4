"""Where every row of a JSON or JSONL file stands, so that rows are read and the file never loaded.

The places of a large file are kept (`kept_places`), so the file is gone through once.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pumice.core.errors import DataError
from pumice.core.files import parse_json, parse_row, sha256_file
from pumice.data.kept_places import Places, kept_places

# Smaller files are gone through faster than their places are looked up.
KEPT_FROM = 16 * 2**20
_CHUNK = 2**22
# No row of training text is as large; what cannot be read up to here is broken.
_LARGEST_ROW = 2**26


class RowFile:
    """The rows of a JSON list or of JSON lines; told apart by content, not by the file's name.

    `places` uint64[rows, 2]: where a row begins, and its line (JSONL) or where it ends (list).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_list = _is_list(path)
        found = kept_places(path, lambda path: _find(path, self.is_list), sha256_file, KEPT_FROM)
        self.places, self._sha256 = found
        if len(self.places) == 0:
            raise DataError(
                f"the data file {path} has no rows; at least one is needed. Make the file again, "
                f"or take it out of the recipe."
            )

    def __len__(self) -> int:
        return len(self.places)

    def read(self, row: int) -> dict[str, Any]:
        """The object of row 0..len-1."""
        if not self.is_list:
            return parse_row(self.raw(row), file=self.path, line=int(self.places[row][1]))
        content = parse_json(self.raw(row), file=self.path)
        if not isinstance(content, dict):
            raise DataError(
                f"{self.place(row)}: a row must be a JSON object {{...}}, given "
                f"{type(content).__name__}. Correct or remove this row."
            )
        return content

    def raw(self, row: int) -> bytes:
        """The bytes of a row as they stand in the file."""
        start, other = (int(number) for number in self.places[row])
        # Opened anew each time: rows are read by several threads, which must not share a position.
        with self.path.open("rb") as file:
            file.seek(start)
            if self.is_list:
                return file.read(other - start)
            return file.readline().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")

    def place(self, row: int) -> str:
        """How errors name a row."""
        number = row + 1 if self.is_list else int(self.places[row][1])
        return f"{self.path}, {'row' if self.is_list else 'line'} {number}"

    def fingerprint(self) -> str:
        """The SHA-256 of the file; of a large one as it was when its places were found."""
        return self._sha256 or sha256_file(self.path)


def _is_list(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(
            f"the data file {path} cannot be opened ({error.strerror}); a readable JSON or JSONL "
            f"file is needed. Check the path, or make the file first."
        ) from error
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _find(path: Path, is_list: bool) -> Places:
    flat = array("Q")
    with path.open("rb") as file:
        for pair in _elements(file, path) if is_list else _lines(file):
            flat.extend(pair)
    return np.frombuffer(flat, dtype=np.uint64).reshape(-1, 2) if flat else np.empty((0, 2), "u8")


def _lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    start = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield start, number
        start += len(line)


def _elements(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    """(begin, end) in bytes of every element of a JSON list, a piece of the file at a time."""
    text = _Text(file, path)
    text.skip()
    text.take(1)  # "["
    text.skip()
    if text.ahead() == "]":
        text.take(1)
    else:
        while True:
            yield text.value()
            text.skip()
            mark = text.ahead()
            if mark not in (",", "]"):
                raise text.error("Expecting ',' or ']'", 0)
            text.take(1)
            if mark == "]":
                break
            text.skip()
    text.skip()
    if text.ahead():
        raise text.error("Extra data", 0)


class _Text:
    """A window on a file's text that knows its place in bytes and lines."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.scan = json.JSONDecoder().raw_decode
        self.text, self.at, self.ended = "", 0, False
        self.byte, self.line, self.column = 0, 1, 0
        if file.read(3) == b"\xef\xbb\xbf":
            self.byte = 3
        else:
            file.seek(0)

    def more(self) -> bool:
        """Adds a piece of the file to the window; False at the end."""
        if self.ended:
            return False
        data = self.file.read(_CHUNK)
        self.ended = not data
        try:
            added = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: byte {self.file.tell() - len(data) + error.start} is not UTF-8 "
                f"text; JSON files must be UTF-8. Save the file again as UTF-8, or download it "
                f"again."
            ) from error
        self.text, self.at = self.text[self.at :] + added, 0
        return not self.ended

    def ahead(self) -> str:
        """The next character, "" at the end."""
        if self.at == len(self.text) and not self.more():
            return ""
        return self.text[self.at : self.at + 1]

    def take(self, count: int) -> None:
        """Steps over `count` characters of the window."""
        passed = self.text[self.at : self.at + count]
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self.line, self.column = self._place_after(passed)
        self.at += count

    def skip(self) -> None:
        """Steps over white space."""
        while (mark := self.ahead()) and mark in " \t\r\n":
            self.take(1)

    def value(self) -> tuple[int, int]:
        """Steps over one JSON value; gives its begin and end in bytes."""
        while True:
            try:
                _, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                ahead = error.pos - self.at
                # Perhaps it goes on beyond the window.
                if len(self.text) - self.at > _LARGEST_ROW or not self.more():
                    raise self.error(error.msg, ahead) from error
                continue
            except (RecursionError, ValueError) as error:
                # Thousands of brackets one in another, a number of thousands of digits.
                raise self.error(str(error), 0) from error
            # A number may go on beyond the window, too.
            if end < len(self.text) or not self.more():
                break
        begin = self.byte
        self.take(end - self.at)
        return begin, self.byte

    def error(self, what: str, ahead: int) -> DataError:
        """What is wrong `ahead` characters from here."""
        line, column = self._place_after(self.text[self.at : self.at + ahead])
        found = self.text[self.at + ahead :][:20].strip()
        return DataError(
            f"{self.path}, line {line}, column {column + 1}: this is not valid JSON ({what}); "
            f"found {found!r}. Correct this line, or make the file again."
        )

    def _place_after(self, passed: str) -> tuple[int, int]:
        """Line and column once this text is passed."""
        lines = passed.count("\n")
        start = -self.column if lines == 0 else passed.rfind("\n") + 1
        return self.line + lines, len(passed) - start
