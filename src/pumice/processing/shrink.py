"""Pillow's shrinking of padded pictures (two of its filters), to the last bit, by matrix products.

Pillow weighs 8-bit levels with weights of 22 binary digits, row by row first and then column by
column, and rounds after each pass. A product in float32 is as good but where a sum lies so near to
a half that its own rounding could decide: those few are computed again in float64, which is exact.
What lies round the picture is of one colour before and after, and is not computed at all.

Shapes: S side of the square after, L weights of one level, R rows of what is filtered together.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

Color = tuple[int, int, int]
Levels = NDArray[np.float32]

# Pillow's PRECISION_BITS (Resample.c).
_BITS = 22
# Levels that share a product, of a row and of a column: more make it wider than its weights, fewer
# make more products.
_ACROSS, _DOWN = 16, 8
# Multiplications of one product: up to a million OpenBLAS has kernels for small matrices, which
# take half the time here, and with half of that what is worked on stays in a core's cache.
_SMALL = 500_000
# Numbers in float32 of which memory is kept for the next picture, for each of three uses.
_KEPT = 2**22
# Pixels of which the three colours are laid apart at a time.
_STRIP = 2**24
# So many times as tall as wide: what lies beside the picture is then most of what rows are made of.
_TALL = 4
# The weights of longer sides take a megabyte and more, and are not kept.
_LONG = 8192
# Of float32, and the additions that round besides those of the weights.
_ROUNDING, _SLACK = 2.0**-24, 2

Bands = tuple[tuple[slice, slice, Levels], ...]
"""Blocks of levels, what they are made of, and the weights, float32[of, levels]."""


class Shrunk(NamedTuple):
    """The part of the square that is not of its colour alone."""

    levels: Levels
    """float32[rows, 3, columns], whole numbers from 0 to 255."""
    top: int
    left: int


@dataclass(frozen=True)
class _Axis:
    """How S levels are made of those of one axis of the square before."""

    sources: NDArray[np.int64]
    """long[S, L]: the levels before that each is made of."""
    weights: NDArray[np.float64]
    """double[S, L], of 22 binary digits: what they make of 8-bit levels is exact."""
    across: Bands
    """Blocks that rows are made in."""
    down: Bands
    """Blocks that columns are made in."""
    down_most: int
    """The weights of the largest block."""
    doubtful: np.float32
    """A sum that is farther than this from a whole number may have been rounded the wrong way."""

    def exact(self, at: NDArray[np.int64], levels: Levels) -> NDArray[np.float64]:
        """long[N] of S, float32[N, L] of their `sources` -> double[N], as Pillow rounds."""
        sums: NDArray[np.float64] = np.einsum("nl,nl->n", levels, self.weights[at])
        return np.floor(sums + 0.5)


def pays(image: PIL.Image.Image, size: int, largest: int, resample: str = "bicubic") -> bool:
    """Whether a square of the longer side shrinks to `size`, and does so here as Pillow does it.

    Pillow is left the pictures of more than `largest` pixels, a strip at a time, unless they are
    very tall: there it filters the whole width of the square in every row. It also is left the
    filters that are not ours.
    """
    if resample not in _FILTERS:
        return False
    side, pixels = max(image.size), image.width * image.height
    if image.height > _TALL * image.width:
        # Levels of rows; those that the picture has no part in are not made.
        room = size * image.width + 2 * _ACROSS * image.height
    else:
        room = max(side * size, pixels)
    return side > size and room <= largest and _as_pillow(resample)


def shrink_padded(
    image: PIL.Image.Image, size: int, color: Color, resample: str = "bicubic"
) -> Shrunk:
    """An RGB picture in the middle of a square of `color`, made `size` wide."""
    side = max(image.size)
    axis = (_axis if side <= _LONG else _axis.__wrapped__)(side, size, resample)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    across, down = _used(axis.across, left, image.width), _used(axis.down, top, image.height)
    # Rows of the square from which the blocks are made, and among them those of the picture.
    begin, end = down[0][1].start, down[-1][1].stop
    columns = slice(across[0][0].start, across[-1][0].stop)
    rows = _space("rows", end - begin, 3, columns.stop - columns.start)
    rows[: top - begin] = rows[top - begin + image.height :] = np.array(color)[:, None]
    inside = rows[top - begin : top - begin + image.height]
    strip = max(1, _STRIP // image.width)
    for row in range(0, image.height, strip):
        part = image
        if strip < image.height:
            part = image.crop((0, row, image.width, min(row + strip, image.height)))
        _filter_rows(part, left, axis, across, color, inside[row : row + strip])
    return Shrunk(_filter_columns(rows, begin, axis, down), down[0][0].start, columns.start)


def _used(bands: Bands, start: int, length: int) -> Bands:
    """Blocks that are made of anything of so many places from `start`."""
    first = bisect_right(bands, start, key=lambda band: band[1].stop)
    last = bisect_left(bands, start + length, key=lambda band: band[1].start)
    return bands[first:last]


def _filter_rows(
    image: PIL.Image.Image,
    left: int,
    axis: _Axis,
    bands: Bands,
    color: Color,
    into: Levels,
) -> None:
    """A picture at column `left` of the square -> float32[height, 3, columns]."""
    # One colour after the other: in Pillow three fast loops instead of a slow one.
    planes = [
        np.frombuffer(image.tobytes("raw", name), np.uint8).reshape(image.height, image.width)
        for name in "RGB"
    ]
    start, width, colors = bands[0][0].start, into.shape[2], np.array(color, np.float32)
    begin, end, around = bands[0][1].start, bands[-1][1].stop, None
    if image.height > _TALL * image.width:
        begin, end = left, left + image.width
        bands, beside = _cut(bands, begin, end)
        around = np.float32(colors[:, None] * beside)
    count = max(1, min(image.height, _SMALL // (3 * _largest(bands))))
    before = _space("before", count, 3, end - begin)
    before[:, :, : left - begin] = colors[:, None]
    before[:, :, left - begin + image.width :] = colors[:, None]
    sums = _space("sums", 3 * count, width)
    for row in range(0, image.height, count):
        for number, plane in enumerate(planes):
            part = plane[row : row + count]
            before[: len(part), number, left - begin : left - begin + image.width] = part
        flat = before[: len(part)].reshape(3 * len(part), -1)
        for made, of, weights in bands:
            np.matmul(
                flat[:, of.start - begin : of.stop - begin], weights,
                out=sums[: len(flat), made.start - start : made.stop - start],
            )  # fmt: skip
        if around is not None:
            sums[: len(flat)].reshape(-1, 3, width)[:] += around

        def exact(at: NDArray[np.int64], flat: Levels = flat) -> NDArray[np.float64]:
            line, place = np.divmod(at, width)
            place += start
            columns = axis.sources[place] - begin
            if around is None:
                return axis.exact(place, flat[line[:, None], columns])
            beside = (columns < 0) | (columns >= image.width)
            inside = flat[line[:, None], columns.clip(0, image.width - 1)]
            return axis.exact(place, np.where(beside, colors[line % 3, None], inside))

        rounded = into[row : row + count].reshape(-1, width)
        _round(sums[: len(flat)], rounded, axis.doubtful, exact)


def _cut(bands: Bands, begin: int, end: int) -> tuple[Bands, NDArray[np.float64]]:
    """Blocks that are made of these places alone; double[levels]: the weights of all others.

    Those are one sum, for what lies there is of one colour: a level is made of no more products
    than before.
    """
    own, beside = [], []
    for made, of, weights in bands:
        first, last = (min(max(at, begin), end) for at in (of.start, of.stop))
        inside = weights[first - of.start : last - of.start]
        own.append((made, slice(first, last), inside))
        beside.append(weights.sum(0, dtype=np.float64) - inside.sum(0, dtype=np.float64))
    return tuple(own), np.concatenate(beside)


def _filter_columns(rows: Levels, begin: int, axis: _Axis, bands: Bands) -> Levels:
    """float32[R, 3, columns], rows of the square from `begin` on -> float32[rows, 3, columns]."""
    flat, start = rows.reshape(len(rows), -1), bands[0][0].start
    width = flat.shape[1]
    sums = _space("sums", bands[-1][0].stop - start, width)
    count = max(1, _SMALL // axis.down_most)
    parts = [slice(column, column + count) for column in range(0, width, count)]
    for made, of, weights in bands:
        for part in parts:
            np.matmul(
                weights.T, flat[of.start - begin : of.stop - begin, part],
                out=sums[made.start - start : made.stop - start, part],
            )  # fmt: skip

    def exact(at: NDArray[np.int64]) -> NDArray[np.float64]:
        place, column = np.divmod(at, width)
        place += start
        return axis.exact(place, flat[axis.sources[place] - begin, column[:, None]])

    rounded = np.empty_like(sums)
    _round(sums, rounded, axis.doubtful, exact)
    return rounded.reshape(len(sums), *rows.shape[1:])


def _round(
    sums: Levels,
    into: Levels,
    doubtful: np.float32,
    exact: Callable[[NDArray[np.int64]], NDArray[np.float64]],
) -> None:
    """Whole numbers from 0 to 255, as Pillow rounds and cuts off; `exact` says them of places.

    What is left of `sums` is how far they lay from whole numbers.
    """
    np.rint(sums, out=into)
    sums -= into
    at = np.flatnonzero(np.abs(sums, out=sums) > doubtful)
    into.reshape(-1)[at] = exact(at)
    torch.from_numpy(into).clamp_(0, 255)  # In half of numpy's time.


class _Space(threading.local):
    """Memory for the next picture of the same thread: fresh pages cost as much as the filter.

    Of so much memory numpy asks Linux for large pages, and what is never written takes none.
    """

    def __call__(self, name: str, *shape: int) -> Levels:
        """An array of this shape, which holds anything; the next of its name takes its place."""
        size = math.prod(shape)
        if size > _KEPT:
            return np.empty(shape, np.float32)
        if name not in self.__dict__:
            self.__dict__[name] = np.empty(_KEPT, np.float32)
        kept: Levels = self.__dict__[name]
        return kept[:size].reshape(shape)


_space = _Space()


@lru_cache(maxsize=256)
def _axis(before: int, after: int, resample: str) -> _Axis:
    """Pillow's weights (precompute_coeffs and normalize_coeffs_8bpc of Resample.c)."""
    curve, reach = _FILTERS[resample]
    scale = before / after
    center = (np.arange(after) + 0.5) * scale
    first = np.maximum(0, (center - reach * scale + 0.5).astype(np.int64))
    last = np.minimum(before, (center + reach * scale + 0.5).astype(np.int64))
    most = int((last - first).max())
    places = np.arange(most)
    shares = curve((places + first[:, None] - center[:, None] + 0.5) * (1.0 / scale))
    shares[places >= (last - first)[:, None]] = 0.0
    # One after the other, as the order decides the last bit.
    total = np.zeros(after)
    for column in shares.T:
        total += column
    shares = shares / total[:, None] * (1 << _BITS)
    units = np.trunc(shares + np.where(shares < 0, -0.5, 0.5)).astype(np.int64)
    return _banded(first, units, before)


def _bicubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    x, a = np.abs(distance), -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _bilinear(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(0.0, 1.0 - np.abs(distance))


# The weight at a distance, and how far it reaches. The sine of Lanczos is not the same everywhere.
_FILTERS = {"bicubic": (_bicubic, 2.0), "bilinear": (_bilinear, 1.0)}


def _banded(first: NDArray[np.int64], units: NDArray[np.int64], before: int) -> _Axis:
    after, most = units.shape
    # All have equally many weights, also those at the end: zeros stand before them.
    begins = np.minimum(first, before - most)
    weights = np.zeros_like(units)
    rows, places = np.nonzero(units)
    weights[rows, places + (first - begins)[rows]] = units[rows, places]
    heaviest = np.abs(weights).sum(1).max() / (1 << _BITS)
    # The bound of a sum in any order: one rounding for each product and addition.
    doubtful = np.float32(0.5 - 255 * heaviest * (most + _SLACK) * _ROUNDING)
    across, down = (_in_blocks(begins, weights, length) for length in (_ACROSS, _DOWN))
    sources, shares = begins[:, None] + np.arange(most), weights / (1 << _BITS)
    return _Axis(sources, shares, across, down, _largest(down), doubtful)


def _largest(bands: Bands) -> int:
    """The weights of the block that has the most."""
    return max(weights.size for _, _, weights in bands)


def _in_blocks(begins: NDArray[np.int64], weights: NDArray[np.int64], length: int) -> Bands:
    """long[S], long[S, L]: the weights of each level -> of so many levels together."""
    after, most = weights.shape
    bands = []
    for start in range(0, after, length):
        stop = min(start + length, after)
        begin, end = int(begins[start]), int(begins[stop - 1]) + most
        band = np.zeros((end - begin, stop - start), np.float32)
        made = np.arange(start, stop)
        of = begins[made, None] - begin + np.arange(most)
        # 22 digits are whole in the 24 of float32.
        band[of, (made - start)[:, None]] = weights[made] / (1 << _BITS)
        bands.append((slice(start, stop), slice(begin, end), band))
    return tuple(bands)


@cache
def _as_pillow(resample: str) -> bool:
    """Whether the Pillow that is here rounds as these lines do; asked once of a noisy picture."""
    noise = np.random.default_rng(0).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    picture, size, color = PIL.Image.fromarray(noise), 17, (122, 116, 104)
    square = PIL.Image.new("RGB", (71, 71), color)
    square.paste(picture, (0, 9))
    small = square.resize((size, size), PIL.Image.Resampling[resample.upper()])
    expected = np.asarray(small).swapaxes(1, 2)
    found, top, left = shrink_padded(picture, size, color, resample)
    rows, _, columns = found.shape
    return bool(np.array_equal(found, expected[top : top + rows, :, left : left + columns]))
