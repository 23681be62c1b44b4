"""The pickled references of RefCOCO, read without running anything that a pickle could name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import parse_json


def read_refs(file: Path) -> Any:
    """The content of `refs(unc).p`, or of a JSON file."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"the file {file} cannot be read ({error.strerror}); a readable file is needed. Check "
            f"the path, or download it first."
        ) from error
    if data.lstrip()[:1] in (b"{", b"["):
        return parse_json(data, file=file)
    return _unpickled(data, file)


def _unpickled(data: bytes, file: Path) -> Any:
    try:
        # The files were written by Python 2, whose texts are bytes.
        try:
            return _Plain(io.BytesIO(data), encoding="utf-8").load()
        except UnicodeDecodeError:
            return _Plain(io.BytesIO(data), encoding="latin-1").load()
    except _ERRORS as error:
        raise DataError(
            f"{file} is neither JSON nor a pickle of lists, dictionaries, texts and numbers "
            f"({error}); nothing else is read from a pickle. Take the official refs(...).p."
        ) from error


_ERRORS = (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError)


class _Plain(pickle.Unpickler):
    """Refuses every name of code, so that only plain values come out of a file."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")
