"""Reading and writing files so that a crash leaves no half file and a broken line is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from pumice.core.errors import DataError
from pumice.core.log import get_logger

log = get_logger(__name__)

_END = 2**20
# How halves of a character (lone surrogates) are written: JSON may hold them, and so do names of
# files that are no UTF-8. Escaped, and in JSON as they can only have stood there.
HALVES = "backslashreplace"
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def read_json(path: Path | str) -> Any:
    """The content of a JSON file; a missing or broken file is an error that says where."""
    path = Path(path)
    return parse_json(_read_bytes(path), file=path)


def parse_json(data: bytes, *, file: Path, line: int | None = None) -> Any:
    """The value written in `data`; `file` and `line` (one row of a JSONL file) name it in errors.

    A byte order mark at the front is allowed, as some editors write one.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        at = error.lineno if line is None else line
        raise DataError(
            f"{file}, line {at}, column {error.colno}: this is not valid JSON ({error.msg}); "
            f"found {_excerpt(error.doc, error.pos)}. Correct this line, or make the file again."
        ) from error
    except UnicodeDecodeError as error:
        at = data.count(b"\n", 0, error.start) + 1 if line is None else line
        raise DataError(
            f"{file}, line {at}: byte {error.start} is not UTF-8 text; JSON files must be UTF-8. "
            f"Save the file again as UTF-8, or download it again."
        ) from error
    except (RecursionError, ValueError) as error:
        # Thousands of brackets one in another, a number of thousands of digits.
        place = "" if line is None else f", line {line}"
        raise DataError(
            f"{file}{place}: this JSON is more than can be read ({error}). Correct it, or make the "
            f"file again."
        ) from error


def read_jsonl(
    path: Path | str, *, allow_cut_tail: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of every row of a JSONL file; empty lines are passed over.

    `allow_cut_tail` leaves out, with a logged warning, a last line which a crash cut short: it has
    no line end and is no JSON. Every other broken line is an error with its place.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise _cannot_read(path, error) from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if allow_cut_tail and not line.endswith(b"\n") and not _is_json(line):
                log.warning("%s, line %d was cut short by a crash and is left out", path, number)
                return
            yield number, parse_row(line, file=path, line=number)


def parse_row(data: bytes, *, file: Path, line: int) -> dict[str, Any]:
    """The object in one line of a JSONL file."""
    # Without its line end, so that an error at the end counts its column on this line.
    row = parse_json(data.rstrip(b"\r\n"), file=file, line=line)
    if not isinstance(row, dict):
        raise DataError(
            f"{file}, line {line}: a row must be a JSON object {{...}}, given "
            f"{type(row).__name__}. Correct this line, or make the file again."
        )
    return row


class JsonlWriter:
    """Appends rows to a JSONL file; each is on disk before the next one is made.

    A last line that a crash cut short is removed first, with a logged warning.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_tail(self.path)
        self._file = self.path.open("a", encoding="utf-8", errors=HALVES)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row; an OSError names the file."""
        with _naming(self.path):
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Ends the writing; closing twice is fine."""
        # What a full disk did not take is tried once more, and told once more.
        with _naming(self.path):
            self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def write_atomic(path: Path | str, content: str | bytes, *, sync: bool = True) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part of it.

    `sync=False` does not wait for the disk: a power cut may lose what was written.
    """
    # Through a link, so that the file behind it is replaced and not the link.
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", HALVES) if isinstance(content, str) else content
    # Not from `tempfile`: its files can be read by their owner only.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with _naming(path), part.open("xb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk is told without a name by the system; here it gets the file's."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path | str, obj: Any) -> None:
    """Writes an indented JSON file atomically."""
    write_atomic(path, json.dumps(obj, ensure_ascii=False, indent=2) + "\n")


def cache_dir() -> Path:
    """Where what can be made again is kept between runs; `PUMICE_CACHE` moves it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PUMICE_CACHE") or Path(base) / "pumice")


def entries_of(directory: Path) -> str:
    """The names in a directory for an error message, eight at most; "nothing" without any."""
    held = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    return ", ".join(held[:8]) or "nothing"


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file in hexadecimal, read piece by piece."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _cannot_read(path, error) from error


def sha256_ends(path: Path | str) -> str:
    """Size and SHA-256 of the first and last MiB, for files too large to be read whole."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            ends = file.read(_END)
            file.seek(max(size - _END, 0))
            ends += file.read(_END)
    except OSError as error:
        raise _cannot_read(path, error) from error
    return f"{size} {sha256_bytes(ends)}"


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _cannot_read(path, error) from error


def _cannot_read(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(
            f"the file {path} does not exist; an existing file is needed. Check the path, or "
            f"download or make the file first."
        )
    return DataError(
        f"the file {path} cannot be read ({error.strerror}); a readable file is needed. Check "
        f"the path and its permissions."
    )


def _excerpt(text: str, position: int) -> str:
    around = text[max(0, position - 20) : position + 20].strip()
    return repr(around) if around else "nothing"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (RecursionError, ValueError):
        return False
    return True


def _mend_tail(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        tail_start, tail = _last_line(file.read())
        if tail.endswith(b"\n"):
            return
        if _is_json(tail):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
            return
        log.warning("%s: its last line was cut short by a crash and is removed", path)
        file.truncate(tail_start)


def _last_line(data: bytes) -> tuple[int, bytes]:
    start = data.rfind(b"\n", 0, len(data) - 1) + 1
    return start, data[start:]
