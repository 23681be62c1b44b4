"""Looks at one image as training will: there, of a sound size, decoded whole; and its hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from pumice.core.errors import DataError
from pumice.core.images import MAX_PIXELS, image_header, open_image
from pumice.data.picture_hash import PictureHash, hash_picture

MIN_SIDE = 8


class ImageFacts(NamedTuple):
    """What was found (kind, reason), and what tells the picture from others; None if unreadable."""

    findings: list[tuple[str, str]]
    digest: bytes
    hash: PictureHash | None


def check_image(
    image: Path | bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> ImageFacts:
    """An image of a row; faults are told without the row, which the caller knows."""
    try:
        # Also this may fail: a name that is too long, a directory that may not be entered.
        if isinstance(image, Path) and not image.exists():
            return _fault("image_missing", f"image {image} does not exist")
        header = image_header(image)
        width, height = header.size
        if width * height > max_pixels or min(width, height) < min_side:
            allowed = f"sides from {min_side} and at most {max_pixels:,} pixels are allowed"
            return _fault("image_size", f"image {name_of(image)} has {width} x {height}; {allowed}")
        picture = open_image(image, max_pixels=max_pixels)
        digest = _digest(image)
    except DataError as error:
        return _fault("image_unreadable", str(error))
    except OSError as error:
        return _fault("image_unreadable", f"image {name_of(image)}: {error.strerror}")
    findings = []
    # 0, which many cameras write, and others turn nothing.
    if 2 <= header.orientation <= 8:
        reason = f"image {name_of(image)} has EXIF orientation {header.orientation}; it is turned"
        findings.append(("image_turned", f"{reason} upright when it is read"))
    if header.transparent or header.mode not in ("RGB", "L", "P", "1"):
        what = "is transparent" if header.transparent else f"has mode {header.mode}"
        findings.append(("image_mode", f"image {name_of(image)} {what}; it becomes 8-bit RGB"))
    return ImageFacts(findings, digest, hash_picture(picture))


def name_of(image: Path | bytes) -> str:
    """How people are told of it."""
    return str(image) if isinstance(image, Path) else f"(given as {len(image)} bytes)"


def image_key(image: Path | bytes) -> str:
    """Equal for images that need to be looked at once."""
    return str(image) if isinstance(image, Path) else _digest(image).hex()


def _fault(kind: str, reason: str) -> ImageFacts:
    return ImageFacts([(kind, reason)], b"", None)


def _digest(image: Path | bytes) -> bytes:
    data = image.read_bytes() if isinstance(image, Path) else image
    return hashlib.sha256(data).digest()[:16]
