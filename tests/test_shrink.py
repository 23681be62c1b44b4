"""Shrinking out of matrix products gives Pillow's own levels, to the last bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.processing import images, shrink
from pumice.processing.images import ImageSpec, preprocess

SIDES = st.integers(1, 700)
RESAMPLES = ("bicubic", "bilinear")
KINDS = ("noise", "black and white", "flat")


def picture(kind: str, width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    if kind == "flat":
        return PIL.Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    levels = rng.integers(0, 256, (height, width, 3))
    if kind == "black and white":
        levels = 255 * (levels % 2)
    return PIL.Image.fromarray(levels.astype(np.uint8))


def by_pillow(
    image: PIL.Image.Image, size: int, color: tuple[int, int, int], resample: str = "bicubic"
) -> np.ndarray:
    """uint8[S, S, 3]: the square that LLaVA makes, and Pillow's own filter."""
    side = max(image.size)
    square = PIL.Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), PIL.Image.Resampling[resample.upper()]))


def shrunk(
    image: PIL.Image.Image, size: int, color: tuple[int, int, int], resample: str = "bicubic"
) -> np.ndarray:
    """uint8[S, S, 3] by ours, in a square of its colour."""
    levels, top, left = shrink.shrink_padded(image, size, color, resample)
    rows, _, columns = levels.shape
    square = np.empty((size, size, 3), np.uint8)
    square[:] = color
    square[top : top + rows, left : left + columns] = levels.swapaxes(1, 2)
    return square


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(KINDS), SIDES, SIDES, st.integers(1, 400), st.integers(0, 2**31),
    st.sampled_from(RESAMPLES),
)  # fmt: skip
def test_every_level_is_pillows(
    kind: str, width: int, height: int, size: int, seed: int, resample: str
) -> None:
    image = picture(kind, width, height, seed)
    color = tuple(np.random.default_rng(seed + 1).integers(0, 256, 3).tolist())
    if max(width, height) > size:
        ours, theirs = (make(image, size, color, resample) for make in (shrunk, by_pillow))
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (3000, 2000, 336),
        (3000, 2000, 1024),
        (640, 480, 336),
        (480, 640, 336),
        (337, 337, 336),
        (5000, 3, 17),
        (3, 5000, 17),
        (90, 3000, 336),
        (1, 9000, 30),
        (2, 1, 1),
    ],
)
def test_sizes_of_cameras_and_odd_ones(width: int, height: int, size: int, resample: str) -> None:
    color = (122, 116, 104)
    image = picture("noise", width, height)
    ours, theirs = (make(image, size, color, resample) for make in (shrunk, by_pillow))
    assert np.array_equal(ours, theirs)


def test_sums_too_near_to_a_half_are_computed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    exact = shrink._Axis.exact

    def counted(self: shrink._Axis, at: np.ndarray, levels: np.ndarray) -> np.ndarray:
        asked.append(len(at))
        return exact(self, at, levels)

    monkeypatch.setattr(shrink._Axis, "exact", counted)
    shrink.shrink_padded(picture("noise", 640, 480), 336, (0, 0, 0))
    across, down = sum(asked[:-1]), asked[-1]
    # Of 484 and 254 thousand sums; each may be off by less than a five thousandth.
    assert 20 < across < 1000
    assert 10 < down < 500


def test_tall_pictures_are_read_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "_STRIP", 700)
    image = picture("noise", 30, 1000)
    assert np.array_equal(shrunk(image, 64, (9, 99, 199)), by_pillow(image, 64, (9, 99, 199)))


def test_weights_of_long_sides_are_not_kept() -> None:
    shrink._axis.cache_clear()
    for side in (300, 8192, 8193, 9000):
        shrink.shrink_padded(picture("flat", 2, side), 8, (0, 0, 0))
    assert shrink._axis.cache_info().currsize == 2
    shrink._axis.cache_clear()


def test_threads_do_not_share_their_memory() -> None:
    pictures = [picture("noise", 500 + 10 * n, 400 - 7 * n, n) for n in range(16)]
    spec = ImageSpec("pad", 224)
    alone = [preprocess(one, spec) for one in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: preprocess(one, spec), pictures * 3))
    for number, pixels in enumerate(together):
        assert pixels.equal(alone[number % len(alone)])


def test_what_grows_is_huge_or_meets_another_pillow_is_left_to_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ours(image: PIL.Image.Image, size: int) -> bool:
        return shrink.pays(image, size, images.LARGEST)

    assert ours(picture("flat", 400, 300), 336)
    assert not ours(picture("flat", 300, 336), 336)
    assert not ours(picture("flat", 5000, 4000), 336)
    assert not ours(picture("flat", 60_000, 2), 336)
    # Of these Pillow would filter the whole width of the square in every row, which takes minutes.
    assert ours(picture("flat", 2, 60_000), 336)
    assert ours(picture("flat", 1080, 30_000), 336)
    assert shrink.pays(picture("flat", 1080, 30_000), 336, images.LARGEST, "bilinear")
    assert not shrink.pays(picture("flat", 400, 300), 336, images.LARGEST, "lanczos")
    image, spec = picture("noise", 400, 300), ImageSpec("pad", 336)
    before = preprocess(image, spec)
    # As if Pillow rounded otherwise.
    monkeypatch.setattr(shrink, "_BITS", 8)
    shrink._as_pillow.cache_clear()
    shrink._axis.cache_clear()
    try:
        assert not ours(image, 336)
        assert preprocess(image, spec).equal(before)
    finally:
        monkeypatch.undo()
        shrink._as_pillow.cache_clear()
        shrink._axis.cache_clear()
