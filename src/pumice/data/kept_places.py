"""Places of rows in large files, found once and kept on disk.

They lie in the user's cache and are mapped into memory, so all processes of a machine share them.
They hold for one path, size and time of change; a file that changed is gone through again.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pumice.core.files import cache_dir, read_json, sha256_bytes, write_atomic, write_json
from pumice.core.log import get_logger

log = get_logger(__name__)

Places = np.ndarray[Any, np.dtype[np.uint64]]
# Changes when places are written another way.
_FORMAT = 1


def kept_places(
    path: Path, find: Callable[[Path], Places], digest: Callable[[Path], str], kept_from: int
) -> tuple[Places, str | None]:
    """The places of all rows of a file, and its digest.

    A file below `kept_from` bytes is gone through each time, and its digest is left to the caller.
    """
    state = path.stat()
    if state.st_size < kept_from:
        return find(path), None
    name = sha256_bytes(str(path.resolve()).encode())[:24]
    stamp = f"{state.st_size}-{state.st_mtime_ns}-{_FORMAT}"
    folder = cache_dir() / "rows"
    record, kept = folder / f"{name}.{stamp}.json", folder / f"{name}.{stamp}.npy"
    if record.is_file() and kept.is_file():
        return np.load(kept, mmap_mode="r"), str(read_json(record)["digest"])
    log.info("%s: its rows are looked for once (%.1f GB)", path, state.st_size / 1e9)
    places, made = find(path), digest(path)
    buffer = io.BytesIO()
    np.save(buffer, places)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{name}.*"):
            old.unlink(missing_ok=True)
        write_atomic(kept, buffer.getvalue())
        # Last: its presence says that the places are whole.
        write_json(record, {"file": str(path), "rows": len(places), "digest": made})
    except OSError as error:
        log.warning("the places of its rows cannot be kept in %s (%s)", folder, error)
        return places, made
    return np.load(kept, mmap_mode="r"), made
