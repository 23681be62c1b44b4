"""Perceptual hashes: the same picture is found again although it was resized or saved anew.

A difference hash (dHash) of 128 bits proposes pairs, a small colour picture confirms them. Both
forgive another size, format or JPEG quality; a crop, a mirror or another brightness is another
picture to them.

Shapes: N = pictures, B = 16-bit bands of a hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

Bits = np.ndarray[Any, np.dtype[np.uint64]]
Small = np.ndarray[Any, np.dtype[np.uint8]]
Pairs = np.ndarray[Any, np.dtype[np.int64]]

SIDE = 8
_MIDDLE = SIDE * (SIDE + 1)
# A step of fewer grey levels is noise of the compression, not an edge: it counts as none.
_EDGE = 3
# Two hashes of the same picture differ in at most so many of 128 bits; with one band more than
# that, one band at least is equal, which is how pairs are found without comparing all.
TOLERANCE = 7
_BANDS = TOLERANCE + 1
# The small pictures may differ by so much, on average and anywhere (of 255).
_MEAN, _MOST = 3.5, 16


class PictureHash(NamedTuple):
    """`bits` uint64[2] and `small` uint8[8, 8, 3] of one picture."""

    bits: Bits
    small: Small


def hash_picture(image: PIL.Image.Image) -> PictureHash:
    """An upright RGB picture's hash."""
    # Both sizes divide 72, so one pass over the large picture serves both.
    middle = image.resize((_MIDDLE, _MIDDLE), PIL.Image.Resampling.BILINEAR)
    grey = np.asarray(middle.convert("L").reduce(_MIDDLE // (SIDE + 1))).astype(np.int16)
    edges = [
        grey[:SIDE, 1:] > grey[:SIDE, :-1] + _EDGE,
        grey[1:, :SIDE] > grey[:-1, :SIDE] + _EDGE,
    ]
    bits = np.packbits(np.stack(edges).reshape(2, -1), axis=1).view(np.uint64).reshape(2)
    small = middle.reduce(_MIDDLE // SIDE)
    return PictureHash(bits, np.asarray(small))


def stack(hashes: list[PictureHash]) -> PictureHash:
    """Hashes of N pictures as uint64[N, 2] and uint8[N, 8, 8, 3]."""
    if not hashes:
        return PictureHash(np.empty((0, 2), "u8"), np.empty((0, SIDE, SIDE, 3), "u1"))
    return PictureHash(np.stack([h.bits for h in hashes]), np.stack([h.small for h in hashes]))


def same_pictures(hashes: PictureHash, first: int = 0) -> Pairs:
    """int[pairs, 2]: which of N pictures are the same, the smaller number first.

    With `first`, only pairs of one below `first` and one from there on: training and evaluation.
    """
    found = [_confirmed(hashes, pairs) for pairs in _proposed(hashes.bits, first)]
    if not found:
        return np.empty((0, 2), dtype=np.int64)
    return np.unique(np.concatenate(found), axis=0)


def _proposed(bits: Bits, first: int) -> Iterator[Pairs]:
    """Pairs with an equal band, a bounded number at a time; a pair may come several times."""
    bands = bits.view(np.uint16).reshape(len(bits), _BANDS)
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        ends = np.flatnonzero(np.diff(band[order])) + 1
        for group in np.split(order, ends):
            yield from _pairs(np.sort(group), first)


def _pairs(group: Pairs, first: int) -> Iterator[Pairs]:
    """All pairs of a sorted group that `first` allows."""
    if len(group) < 2:
        return
    cut = int(np.searchsorted(group, first))
    left = group[:cut] if first else group
    rows = max(1, 2**20 // len(group))
    for start in range(0, len(left), rows):
        a, b = np.meshgrid(left[start : start + rows], group[cut:], indexing="ij")
        chosen = a < b
        if chosen.any():
            yield np.stack([a[chosen], b[chosen]], axis=1)


def _confirmed(hashes: PictureHash, pairs: Pairs) -> Pairs:
    """Those with few bits and little colour between them."""
    a, b = pairs[:, 0], pairs[:, 1]
    apart = np.bitwise_count(hashes.bits[a] ^ hashes.bits[b]).sum(axis=1)
    pairs = pairs[apart <= TOLERANCE]
    kept = []
    for start in range(0, len(pairs), 2**14):
        piece = pairs[start : start + 2**14]
        left, right = (hashes.small[piece[:, k]].astype(np.int16) for k in (0, 1))
        gap = np.abs(left - right).reshape(len(piece), -1)
        kept.append(piece[(gap.mean(axis=1) <= _MEAN) & (gap.max(axis=1) <= _MOST)])
    return np.concatenate(kept) if kept else pairs
