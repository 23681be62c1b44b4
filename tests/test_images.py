"""Images: every sound picture comes out as upright RGB, every other is named."""

from __future__ import annotations

import io
import logging
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngImageFile

from pumice.core.errors import DataError
from pumice.core.images import image_header, image_size, open_image
from tiny import smooth as picture

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos" / "images"
WHERE = "sample '7' (train.json, row 3)"


def encoded(image: PIL.Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def grey_levels(values: list[list[float]], dtype: Any) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.array(values, dtype=dtype))


def pixels(image: PIL.Image.Image) -> list[list[int]]:
    """Grey values row by row, after a check that the picture is grey RGB."""
    array = np.asarray(image)
    assert image.mode == "RGB" and (array == array[:, :, :1]).all()
    return array[:, :, 0].tolist()


# Sound pictures of every kind


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(kind: str, orientation: int) -> None:
    blocks = np.kron(np.array([[0, 80, 160], [240, 40, 120]]), np.ones((16, 16)))
    upright = np.repeat(blocks[:, :, None], 3, axis=2).astype(np.uint8)
    # How a camera held that way stores the scene, from the EXIF table (row 0, column 0).
    stored: dict[int, Callable[[Any], Any]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    image = PIL.Image.fromarray(np.ascontiguousarray(stored[orientation](upright)))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    opened = open_image(data)
    assert opened.size == image_size(data) == (48, 32)
    # JPEG's loss stays below 4; the blocks differ by 40 and more.
    assert np.abs(np.asarray(opened).astype(int) - upright).max() < 4
    assert np.array_equal(np.asarray(open_image(opened)), np.asarray(opened))


def test_what_a_file_says_besides_its_pixels_is_not_carried_on() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "maker"
    opened = open_image(encoded(picture(24, 16), "JPEG", exif=exif, comment=b"private"))
    assert opened.info == {} and type(opened.copy()) is PIL.Image.Image
    assert b"private" not in encoded(opened, "JPEG") and b"maker" not in encoded(opened, "JPEG")
    assert b"maker" not in encoded(opened, "PNG") and b"maker" not in encoded(opened, "WEBP")


def test_an_opened_picture_is_turned_and_left_as_it_was() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = PIL.Image.open(io.BytesIO(encoded(picture(24, 16), "JPEG", exif=exif)))
    assert open_image(image).size == image_size(image) == (16, 24)
    assert image.size == (24, 16) and image.getexif()[0x0112] == 6


def test_cmyk_jpeg() -> None:
    # Large flat fields, because JPEG changes the borders between colours.
    red = PIL.Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    opened = open_image(encoded(red, "JPEG", quality=95))
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened).astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_cut_off(kind: str) -> None:
    image = grey_levels([[0, 257, 32896, 65535]], np.uint16)
    assert image.mode == "I;16"
    assert pixels(open_image(encoded(image, kind))) == [[0, 1, 128, 255]]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([[0, 100, 255]], np.int32, [[0, 100, 255]]),
        ([[0, 25700, 65535]], np.int32, [[0, 100, 255]]),
        ([[-1000, 0, 1000]], np.int32, [[0, 128, 255]]),
        ([[0.0, 0.5, 1.0]], np.float32, [[0, 128, 255]]),
        ([[0.0, 100.0, 255.0]], np.float32, [[0, 100, 255]]),
        ([[0.0, 1e6, 4e6]], np.float32, [[0, 64, 255]]),
        ([[7e6, 7e6, 7e6]], np.float32, [[0, 0, 0]]),
    ],
)
def test_wide_grey_values_fit_into_8_bits(
    values: list[list[float]], dtype: Any, expected: list[list[int]]
) -> None:
    assert pixels(open_image(encoded(grey_levels(values, dtype), "TIFF"))) == expected


def test_float_pixels_that_are_no_numbers_are_refused() -> None:
    data = encoded(grey_levels([[0.0, float("nan")]], np.float32), "TIFF")
    with pytest.raises(DataError, match="NaN or infinite"):
        open_image(data)


def test_16_bit_pgm() -> None:
    levels = np.array([0, 25700, 65535], dtype=">u2").tobytes()
    assert pixels(open_image(b"P5 3 1 65535\n" + levels)) == [[0, 100, 255]]


def test_transparency_is_laid_on_white() -> None:
    rgba = PIL.Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    opened = open_image(encoded(rgba, "PNG"))
    assert np.asarray(opened)[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    la = PIL.Image.new("LA", (3, 1))
    la.putdata([(0, 255), (0, 0), (200, 255)])
    assert pixels(open_image(encoded(la, "PNG"))) == [[0, 255, 200]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency(kind: str) -> None:
    image = PIL.Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    opened = open_image(encoded(image, kind, transparency=1))
    assert np.asarray(opened)[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_a_transparent_colour_in_rgb_png_and_per_colour_alpha() -> None:
    rgb = PIL.Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (9, 9, 9))
    opened = open_image(encoded(rgb, "PNG", transparency=(1, 2, 3)))
    assert np.asarray(opened)[0].tolist() == [[255, 255, 255], [9, 9, 9]]
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 255, 255])
    opened = open_image(encoded(image, "PNG", transparency=bytes([0, 255])))
    assert pixels(opened) == [[255, 255]]


def test_one_bit_and_plain_grey() -> None:
    one = PIL.Image.new("1", (2, 1), 0)
    one.putpixel((1, 0), 1)
    assert pixels(open_image(encoded(one, "PNG"))) == [[0, 255]]
    assert pixels(open_image(encoded(PIL.Image.new("L", (2, 1), 77), "PNG"))) == [[77, 77]]


def test_of_an_animation_the_first_frame_is_used_and_noted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    frames = [PIL.Image.new("L", (4, 4), level) for level in (50, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.INFO, "pumice"):
        opened = open_image(data, where=WHERE)
    assert pixels(opened)[0][0] == 50
    assert WHERE in caplog.text and "the first one is used" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "pumice"):
        open_image(encoded(frames[0], "GIF"))
    assert caplog.text == ""


def test_very_wide_pictures_open(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    PIL.Image.new("RGB", (20_000, 10), (1, 2, 3)).save(path)
    assert open_image(path).size == image_size(path) == (20_000, 10)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_spoil_a_sound_picture() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert open_image(data).size == (24, 16)


# Unsound pictures: every error names the sample, the file and what to do


def refused(source: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(source, where=WHERE, **settings)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: image ")
    if isinstance(source, Path):
        assert str(source) in message
    return message


def test_a_missing_file(tmp_path: Path) -> None:
    message = refused(tmp_path / "missing.jpg")
    assert "does not exist" in message and "Check the path" in message
    assert "is a directory, not a file" in refused(tmp_path)


def test_a_zero_byte_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    for source in (tmp_path / "a.jpg", b""):
        message = refused(source)
        assert "empty (0 bytes)" in message and "download the file again" in message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_file(tmp_path: Path, kind: str, part: float) -> None:
    data = encoded(picture(200, 150), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(part * len(data))])
    message = refused(path)
    assert "damaged" in message and "download the file again" in message


def test_a_damaged_header(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(), "PNG")[:20])
    assert "download the file again" in refused(path)


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ("just some wörds\n".encode(), "text file"),
        (b"\x00" * 500, ""),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\n<!DOCTYPE html><html>404 <svg></svg></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ],
)
def test_something_that_is_no_image(tmp_path: Path, data: bytes, hint: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    message = refused(path)
    assert "is not an image that can be read" in message and hint in message
    assert "Allowed: JPEG" in message


def test_over_the_pixel_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(30, 20).save(path)
    message = refused(path, max_pixels=599)
    assert "30 x 20 = 600 pixels; at most 599 are allowed" in message and "smaller" in message
    assert open_image(path, max_pixels=600).size == (30, 20)
    assert "at most 599" in refused(picture(30, 20), max_pixels=599)


def test_pillows_own_limit_neither_warns_nor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(encoded(picture(30, 20), "PNG")).size == (30, 20)
        assert open_image(encoded(picture(11, 10), "GIF")).size == (11, 10)
    assert PIL.Image.MAX_IMAGE_PIXELS == 100


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("source", ["bytes", "path"])
def test_the_header_of_a_png_is_read_without_its_pixels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    plain = encoded(picture(30, 20), "PNG")
    late = plain[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[-12:]
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>'
    told = plain[:-12] + chunk(b"iTXt", xmp) + plain[-12:]
    for data, turned in ((plain, 1), (late, 6), (told, 8)):
        size = (30, 20) if turned == 1 else (20, 30)
        (tmp_path / "a.png").write_bytes(data)
        given = data if source == "bytes" else tmp_path / "a.png"
        assert open_image(given).size == size
        with monkeypatch.context() as patch:
            patch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
            assert image_size(given) == size
            assert image_header(given).orientation == turned


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_an_icon_cannot_hide_a_bomb(kind: str) -> None:
    bomb = encoded(PIL.Image.new("1", (14_000, 14_000)), "PNG")
    if kind == "ICO":
        entry = struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(bomb), 22)
        data = struct.pack("<HHH", 0, 1, 1) + entry + bomb
    else:
        inner = b"ic07" + struct.pack(">I", 8 + len(bomb)) + bomb
        data = b"icns" + struct.pack(">I", 8 + len(inner)) + inner
    assert "196000000 pixels" in refused(data)


def test_a_postscript_program_is_not_run() -> None:
    assert "PostScript" in refused(encoded(picture(), "EPS"))


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    # The header claims 60,000 x 60,000; nothing of that size may be allocated.
    data = bytearray(encoded(PIL.Image.new("1", (8, 8)), "BMP"))
    data[18:26] = (60_000).to_bytes(4, "little") * 2
    tracemalloc.start()
    try:
        assert "3,600,000,000 pixels" in refused(bytes(data))
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
