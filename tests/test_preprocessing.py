"""Pixels as the reference makes them, bit for bit, and the settings they are made with."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.core.images import open_image
from pumice.processing.images import CLIP_MEAN, CLIP_STD, ImageSpec, preprocess
from real_files import PHOTOS, needs
from tiny import smooth as picture

WHERE = "sample '7' (train.json, row 3)"


@pytest.fixture(scope="module")
def references() -> dict[str, Callable[[PIL.Image.Image, int], torch.Tensor]]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    def run(kind: Any, image: PIL.Image.Image, size: int, **settings: Any) -> torch.Tensor:
        processor = kind(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **settings
        )
        return processor(image, return_tensors="pt")["pixel_values"][0]

    return {
        "crop": lambda image, size: run(CLIPImageProcessorPil, image, size),
        "pad": lambda image, size: run(LlavaImageProcessorPil, image, size, do_pad=True),
    }


def test_the_table_of_statistics_is_clips() -> None:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert (list(CLIP_MEAN), list(CLIP_STD)) == (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    assert ImageSpec("pad", 336).canvas_color == (122, 116, 104)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [27, 56, 224, 336])
@pytest.mark.parametrize(
    "shape",
    [(640, 480), (481, 640), (333, 333), (500, 101), (37, 50), (57, 56), (56, 57), (3, 40), (1, 1)],
)
def test_equal_to_the_reference_bit_for_bit(
    references: Any, mode: Any, size: int, shape: tuple[int, int]
) -> None:
    image = picture(*shape)
    ours = preprocess(image, ImageSpec(mode, size))
    assert ours.dtype == torch.float32 and ours.shape == (3, size, size)
    assert ours.is_contiguous()
    assert torch.equal(ours, references[mode](image, size))


@needs(PHOTOS / "images", "photographs")
def test_equal_to_the_reference_on_photographs(references: Any) -> None:
    for path in sorted((PHOTOS / "images").glob("*.jpg"))[:6]:
        image = open_image(path)
        for mode in ("crop", "pad"):
            ours = preprocess(image, ImageSpec(mode, 336))
            assert torch.equal(ours, references[mode](image, 336)), path


@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000)])
@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
def test_very_wide_pictures_take_little_memory(
    mode: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    real_new, real_resize = PIL.Image.new, PIL.Image.Image.resize

    def new(mode: str, size: tuple[int, int], *rest: Any) -> PIL.Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return real_new(mode, size, *rest)

    def resize(self: Any, size: tuple[int, int], *rest: Any, **more: Any) -> PIL.Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return real_resize(self, size, *rest, **more)

    image = real_new("RGB", size, (200, 100, 50))
    monkeypatch.setattr(PIL.Image, "new", new)
    monkeypatch.setattr(PIL.Image.Image, "resize", resize)
    tracemalloc.start()
    result = preprocess(image, ImageSpec(mode, 56, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50e6
    assert largest <= 4096 * 4096
    if mode == "pad":
        # A line through the middle: every place along it is lit, the border is not.
        lit = result.sum(dim=0) > 0
        assert lit.any(dim=0 if size[0] > size[1] else 1).all() and lit.sum() <= 56 * 4
    else:
        assert torch.allclose(result[:, 28, 28], torch.tensor([200.0, 100.0, 50.0]) / 255)


@pytest.mark.parametrize("size", [(900, 40), (40, 900), (2, 999), (7, 1500)])
def test_the_short_cut_for_long_crops_shows_the_same_picture(
    references: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    image = picture(*size)
    exact = references["crop"](image, 56)
    monkeypatch.setattr("pumice.processing.images.LARGEST", 1000)
    short_cut = preprocess(image, ImageSpec("crop", 56))
    # One step of a channel is 1 / 255 / std = 0.0151 at most.
    assert (short_cut - exact).abs().max() < 0.016


@pytest.mark.parametrize("size", [(900, 40), (40, 900), (2, 999), (301, 300)])
def test_padding_strip_by_strip_makes_the_same_pixels(
    references: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    image = picture(*size)
    monkeypatch.setattr("pumice.processing.images.LARGEST", 7 * max(size))
    ours = preprocess(image, ImageSpec("pad", 56))
    assert torch.equal(ours, references["pad"](image, 56))


def test_pad_color_and_resize() -> None:
    spec = ImageSpec(
        "pad", 4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), pad_color=(255, 0, 51),
        resample="bilinear",
    )  # fmt: skip
    tall = PIL.Image.new("RGB", (2, 4), (255, 255, 255))
    padded = preprocess(tall, spec)
    assert padded[:, :, 0].tolist() == [[1.0] * 4, [0.0] * 4, [pytest.approx(0.2)] * 4]
    assert (padded[:, :, 1:3] == 1).all()
    resized = preprocess(tall, ImageSpec("resize", 4, mean=spec.mean, std=spec.std))
    assert (resized == 1).all()


def test_a_picture_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(PumiceError, match="mode L was given; RGB is needed"):
        preprocess(PIL.Image.new("L", (4, 4)), ImageSpec("pad", 4))


def test_image_spec_goes_through_json() -> None:
    for spec in (ImageSpec("pad", 336), ImageSpec("crop", 7, pad_color=(1, 2, 3))):
        assert ImageSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mode": "padd", "size": 4}, "Did you mean 'pad'?"),
        ({"mode": "pad", "sise": 4}, "Did you mean 'size'?"),
        ({"mode": "pad"}, "lack size"),
        ({"mode": "pad", "size": 0}, "from 1"),
        ({"mode": "pad", "size": "336"}, "'336'"),
        ({"mode": "pad", "size": 4, "mean": [0.5]}, "three numbers"),
        ({"mode": "pad", "size": 4, "std": [0, 1, 1]}, "above 0"),
        ({"mode": "pad", "size": 4, "resample": "nearest"}, "bicubic, bilinear, lanczos"),
    ],
)
def test_image_spec_refuses(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(PumiceError) as caught:
        ImageSpec.from_dict(values)
    assert expected in str(caught.value)
