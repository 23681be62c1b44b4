"""Opens any sound picture as upright RGB, and says of any other what is wrong with it."""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngImageFile

from pumice.core.errors import DataError
from pumice.core.log import get_logger

log = get_logger(__name__)

MAX_PIXELS = 100_000_000

ImageSource = Path | bytes | PIL.Image.Image
Transparency = Literal["white", "ignored"]

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged files; they share no base class.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)
_REMEDY = "Restore or download the file again, or leave it out."
_pillow_limit = threading.Lock()
# Bytes of a file that is read by one call: Pillow asks for a little at a time, and under some
# hypervisors ten calls of the system cost a few hundredths of what the picture does.
_AT_ONCE = 16 * 2**20
# The pictures inside are as large as they say themselves, whatever the icon's own header says, and
# one of an ICO is decoded when the file is opened. Only Pillow's own limit bounds them.
_ICONS = ("ICO", "ICNS")
_ICO = b"\0\0\1\0"
# Chunks of a PNG that hold pixels.
_PIXELS = (b"IDAT", b"fdAT")


def open_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    where: str = "",
    transparency: Transparency = "white",
) -> PIL.Image.Image:
    """The picture as upright 8-bit RGB, decoded in full; `where` names the sample in errors.

    EXIF orientation is applied, transparency is laid on white (or `ignored`: the colours that the
    file hides are shown, as transformers and LLaVA show them), 16-bit and float grey values are
    scaled (not cut off) to 8 bits. Of several frames the first is taken, with a logged note; of an
    opened PIL image, which is left as it is, the current one.
    """
    if isinstance(source, PIL.Image.Image):
        name = _name(source)
        _check_size(source.size, max_pixels, name, where)
        return _decode(source, name, where, transparency)
    name = _name(source)
    with _opened(source, name, where, at_once=_AT_ONCE) as file:
        image = _identify(file, name, where)
        _check_size(image.size, max_pixels, name, where)
        _note_frames(image, name, where)
        return _decode(image, name, where, transparency, ours=True)


class ImageHeader(NamedTuple):
    """What a picture's header says: upright width and height, Pillow's mode, EXIF orientation.

    `format` is Pillow's name of the file format, such as JPEG.
    """

    size: tuple[int, int]
    mode: str
    orientation: int
    transparent: bool
    format: str


def image_header(source: Path | bytes, *, where: str = "") -> ImageHeader:
    """The header of a picture; no pixel is decoded."""
    name = _name(source)
    with _opened(source, name, where) as file:
        image = _identify(file, name, where)
        orientation = _header_orientation(image, file)
        return ImageHeader(
            _turned(image, orientation),
            image.mode,
            orientation,
            image.has_transparency_data,
            str(image.format),
        )


def image_size(source: ImageSource, *, where: str = "") -> tuple[int, int]:
    """Width and height of the upright picture; only the header is read."""
    if isinstance(source, PIL.Image.Image):
        return _turned(source, _orientation(source))
    return image_header(source, where=where).size


def _name(source: ImageSource) -> str:
    if isinstance(source, Path):
        return str(source)
    if isinstance(source, bytes):
        return f"(given as {len(source)} bytes)"
    return str(getattr(source, "filename", "") or "(an opened PIL image)")


def _error(where: str, name: str, what: str, remedy: str = _REMEDY) -> DataError:
    return DataError(f"{where + ': ' if where else ''}image {name} {what}. {remedy}")


@contextmanager
def _opened(source: Path | bytes, name: str, where: str, *, at_once: int = 0) -> Iterator[BinaryIO]:
    """What a picture is read from; a file of at most `at_once` bytes is read here, as a whole."""
    if isinstance(source, bytes):
        if not source:
            raise _error(where, name, "is empty (0 bytes)")
        yield io.BytesIO(source)
        return
    try:
        file = open(source, "rb", buffering=0, opener=_at_once_opened)
    except FileNotFoundError as error:
        remedy = "Check the path and the directory it is relative to, or download the file."
        raise _error(where, name, "does not exist", remedy) from error
    except IsADirectoryError as error:
        remedy = "Give the image file itself."
        raise _error(where, name, "is a directory, not a file", remedy) from error
    except OSError as error:
        remedy = "Check the path and its permissions."
        raise _error(where, name, f"cannot be opened ({error.strerror})", remedy) from error
    with io.BufferedReader(file) as reader:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            remedy = "Give the image file itself."
            raise _error(where, name, "is a pipe or a device, not a file", remedy)
        size = state.st_size
        if size == 0:
            raise _error(where, name, "is empty (0 bytes)")
        yield io.BytesIO(_read(file, size, name, where)) if size <= at_once else reader


def _at_once_opened(path: str, flags: int) -> int:
    """Opens a file; a pipe would be waited for until somebody writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read(file: io.FileIO, size: int, name: str, where: str) -> bytes:
    """So many bytes, or what there is of them: the decoder says where a file is cut off."""
    try:
        data = file.read(size) or b""
        while len(data) < size and (more := file.read(size - len(data))):
            data += more
    except OSError as error:
        raise _error(where, name, f"cannot be read ({error.strerror})") from error
    return data


def _identify(file: BinaryIO, name: str, where: str) -> PIL.Image.Image:
    """Reads the header."""
    # Pillow compares every header with a limit of its own and warns or raises; ours is checked by
    # the caller, with both numbers. The limit is a global of Pillow's, hence the lock.
    is_icon = file.read(len(_ICO)) == _ICO
    file.seek(0)
    with _pillow_limit:
        kept = PIL.Image.MAX_IMAGE_PIXELS
        # Pillow refuses what is over twice its limit.
        PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2 if is_icon else None
        try:
            image = PIL.Image.open(file)
        except PIL.UnidentifiedImageError as error:
            file.seek(0)
            what = f"is not an image that can be read{_looks_like(file.read(512))}"
            remedy = "Allowed: JPEG, PNG, WebP, GIF, BMP, TIFF and others Pillow reads. " + _REMEDY
            raise _error(where, name, what, remedy) from error
        except _DAMAGE as error:
            raise _error(where, name, f"has a damaged header ({error})") from error
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = kept
    if image.format == "EPS":
        # Pillow would have Ghostscript run it, for whoever sends it.
        what = "is a PostScript drawing, which is a program, and none is run"
        raise _error(where, name, what, "Draw it into a PNG first.")
    return image


def _looks_like(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return " (it is a web page, probably the error page of a failed download)"
    if b"<svg" in text:
        return " (it is an SVG drawing: draw it into a PNG first)"
    if text.startswith(b"version https://git-lfs"):
        return " (it is a Git LFS pointer: run `git lfs pull`)"
    if head and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return " (it is a text file)"
    return ""


def _check_size(size: tuple[int, int], max_pixels: int, name: str, where: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _error(where, name, f"has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise _error(
            where,
            name,
            f"has {width} x {height} = {width * height:,} pixels; at most {max_pixels:,} are "
            f"allowed",
            "Make the picture smaller first.",
        )


def _note_frames(image: PIL.Image.Image, name: str, where: str) -> None:
    try:
        several = bool(getattr(image, "is_animated", False))
    except _DAMAGE as error:
        raise _error(where, name, f"is truncated or damaged ({error})") from error
    # The further frames of an MPO photograph are its thumbnails and depth maps.
    if several and image.format != "MPO":
        prefix = f"{where}: " if where else ""
        log.info("%simage %s has several frames; the first one is used", prefix, name)


def _decode(
    image: PIL.Image.Image,
    name: str,
    where: str,
    transparency: Transparency,
    *,
    ours: bool = False,
) -> PIL.Image.Image:
    """Upright RGB; a picture that is `ours`, read by nobody else, may become that itself."""
    try:
        with _pillow_limit if image.format in _ICONS else nullcontext():
            image.load()
    except _DAMAGE as error:
        raise _error(where, name, f"is truncated or damaged ({error})") from error
    # After load(), because Pillow turns TIFF pictures upright while it loads them.
    upright = _UPRIGHT.get(_orientation(image))
    if ours and upright is None and image.format == "JPEG" and image.mode == "RGB":
        image.info = {}
        return image
    try:
        rgb = _to_rgb(image, transparency)
    except ValueError as error:
        what = f"cannot be turned into RGB from mode {image.mode} ({error})"
        raise _error(where, name, what, "Save it as an RGB picture first.") from error
    if upright is not None:
        rgb = rgb.transpose(upright)
    # The orientation must not be found again by the next reader of this picture.
    rgb.info = {}
    return rgb


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DAMAGE as error:
        log.debug("EXIF data that cannot be read (%s); the picture is taken as upright", error)
        return 1


def _header_orientation(image: PIL.Image.Image, file: BinaryIO) -> int:
    """The orientation of a picture that is not decoded yet, read from `file`."""
    if image.format != "PNG" or "exif" in image.info:
        return _orientation(image)
    # Pillow would decode a whole PNG to read what stands behind its pixels, and so would a
    # decompression bomb be set off by a look at its header.
    try:
        rest = PngImageFile(_without_pixels(file))
        return int(PIL.Image.Image.getexif(rest).get(_ORIENTATION, 1))
    except _DAMAGE as error:
        log.debug("PNG data that cannot be read (%s); the picture is taken as upright", error)
        return 1


def _without_pixels(file: BinaryIO) -> BinaryIO:
    """A PNG file's chunks but those with pixels."""
    file.seek(0)
    kept = bytearray(file.read(8))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in _PIXELS:
            file.seek(length + 4, io.SEEK_CUR)
        else:
            kept += head + file.read(length + 4)
        if kind == b"IEND":
            break
    return io.BytesIO(kept)


def _turned(image: PIL.Image.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    # Pillow gives the upright size of a TIFF picture already in its header.
    if image.format != "TIFF" and orientation >= 5:
        return height, width
    return width, height


def _to_rgb(image: PIL.Image.Image, transparency: Transparency) -> PIL.Image.Image:
    if image.mode.startswith(("I", "F")):
        return _grey_to_8_bits(image).convert("RGB")
    if image.has_transparency_data and transparency == "white":
        coloured = image.convert("RGBA")
        white = PIL.Image.new("RGBA", coloured.size, "white")
        return PIL.Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scales grey values of more than 8 bits; `convert` would cut them off at 255.

    I;16 is 0..65535 by its format. I and F do not say their range, so it is read from the values:
    0..255, 0..65535 or 0..1 (F) when they fit, otherwise from the smallest to the largest.
    """
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("some pixels are NaN or infinite")
    low, high = float(values.min()), float(values.max())
    darkest = 0.0
    if image.mode.startswith("I;16"):
        brightest = 65535.0
    elif low >= 0 and high <= 1 and image.mode == "F":
        brightest = 1.0
    elif low >= 0 and high <= 255:
        brightest = 255.0
    elif low >= 0 and high <= 65535:
        brightest = 65535.0
    else:
        darkest, brightest = low, high if high > low else low + 1.0
    grey = np.rint((values - darkest) * (255 / (brightest - darkest)))
    return PIL.Image.fromarray(grey.astype(np.uint8))
