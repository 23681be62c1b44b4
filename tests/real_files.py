"""Published files and photographs that lie beside a checkout and do not belong to the repository.

A test of them is left out where they are not: everything that it checks of our code is checked on
files made here as well, and the real ones show that those are made right.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve()
DATA = next(
    (above / "shared" / "data" for above in _HERE.parents if (above / "shared" / "data").is_dir()),
    _HERE.parents[2] / "shared" / "data",
)
CHECKPOINTS = DATA / "checkpoints_format"
PHOTOS = Path(os.environ.get("PUMICE_PHOTOS", DATA / "photos"))


def lacking(path: Path, what: str) -> str:
    """Why a test is left out that needs `path`."""
    place = path.relative_to(DATA) if path.is_relative_to(DATA) else path
    return f"{what}: not in the repository, and not in ../shared/data/{place}"


def needs(path: Path, what: str) -> pytest.MarkDecorator:
    """Leaves a test out where `path` is not."""
    return pytest.mark.skipif(not path.exists(), reason=lacking(path, what))
