"""Odd pictures: the same numbers as transformers' CLIP, LLaVA and SigLIP image processors make."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pumice.core.images import open_image
from pumice.processing.images import ImageSpec, preprocess

SIDE = 56
HALF = (0.5, 0.5, 0.5)
SQUARE = {"height": SIDE, "width": SIDE}
SHORTEST = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}

# Each processor as its releases set it, and the spec that says the same.
KINDS: dict[str, tuple[Callable[[], Any], ImageSpec]] = {
    "clip": (lambda: CLIPImageProcessorPil(**SHORTEST), ImageSpec("crop", SIDE)),
    "llava": (lambda: LlavaImageProcessorPil(**SHORTEST), ImageSpec("crop", SIDE)),
    "llava, padded": (
        lambda: LlavaImageProcessorPil(**SHORTEST, do_pad=True),
        ImageSpec("pad", SIDE),
    ),
    "siglip": (
        lambda: SiglipImageProcessorPil(size=SQUARE, resample=3),
        ImageSpec("resize", SIDE, mean=HALF, std=HALF),
    ),
    "siglip, bilinear": (
        lambda: SiglipImageProcessorPil(size=SQUARE, resample=2),
        ImageSpec("resize", SIDE, mean=HALF, std=HALF, resample="bilinear"),
    ),
}
SIZES = [(1, 1), (1, 37), (37, 1), (2, 999), (1500, 3), (2000, 40), (56, 56), (57, 55), (640, 427)]


def noise(width: int, height: int, channels: int = 3) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(width * 10_000 + height)
    return generator.integers(0, 256, (height, width, channels)).astype(np.uint8)


def stored(image: PIL.Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def check(kind: str, data: bytes) -> None:
    """From the bytes of a file to numbers, by us and by transformers."""
    make, spec = KINDS[kind]
    theirs = make()(load_image(PIL.Image.open(io.BytesIO(data))), return_tensors="pt")
    ours = preprocess(open_image(data), spec)
    torch.testing.assert_close(ours, theirs["pixel_values"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_thin_small_and_wide(kind: str, size: tuple[int, int]) -> None:
    check(kind, stored(PIL.Image.fromarray(noise(*size))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_colours(kind: str, mode: str) -> None:
    image = PIL.Image.fromarray(noise(70, 41)).convert(mode)
    check(kind, stored(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))


@pytest.mark.parametrize("kind", KINDS)
def test_opaque_alpha(kind: str) -> None:
    image = PIL.Image.fromarray(noise(70, 41))
    image.putalpha(255)
    check(kind, stored(image))
    check(kind, stored(PIL.Image.fromarray(noise(33, 60)).convert("L").convert("LA")))


@pytest.mark.parametrize("kind", KINDS)
def test_transparent_pixels_are_white_here_and_their_hidden_colour_there(kind: str) -> None:
    # What transformers shows of them is whatever the drawing program left in the file, often black.
    pixels = noise(70, 41, 4)
    pixels[:, :, 3] = np.where(pixels[:, :, 3] > 127, 255, 0)
    white = np.where(pixels[:, :, 3:] > 0, pixels[:, :, :3], 255).astype(np.uint8)
    make, spec = KINDS[kind]
    theirs = make()(PIL.Image.fromarray(white), return_tensors="pt")["pixel_values"][0]
    ours = preprocess(open_image(stored(PIL.Image.fromarray(pixels, "RGBA"))), spec)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_ignored_transparency_is_theirs(kind: str, mode: str) -> None:
    picture = PIL.Image.fromarray(noise(70, 41, 4), "RGBA")
    data = stored(picture.convert(mode) if mode != "P" else picture.convert("RGB").quantize(16))
    make, spec = KINDS[kind]
    opened = load_image(PIL.Image.open(io.BytesIO(data)))
    theirs = make()(opened, return_tensors="pt")["pixel_values"][0]
    ours = preprocess(open_image(data, transparency="ignored"), spec)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    check(kind, stored(PIL.Image.fromarray(noise(61, 40)), "PNG", exif=exif))
