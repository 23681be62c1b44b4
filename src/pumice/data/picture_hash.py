"""Perceptual hashes: the same picture is found again although it was resized or saved anew.

A difference hash (dHash) of 128 bits proposes pairs, a small colour picture and a finer grey one
confirm them. All forgive another size, format or JPEG quality; a crop, a mirror or another
brightness is another picture to them. The finer one tells pages of text, charts and drawings on an
even ground apart, which are alike for the others; pictures that hold next to nothing are the same
only where next to nothing differs anywhere.

Shapes: N = pictures, B = 16-bit bands of a hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

Bits = np.ndarray[Any, np.dtype[np.uint64]]
Small = np.ndarray[Any, np.dtype[np.uint8]]
Grey = np.ndarray[Any, np.dtype[np.int16]]
Levels = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Pairs = np.ndarray[Any, np.dtype[np.int64]]

SIDE, FINE = 8, 24
_MIDDLE = SIDE * (SIDE + 1)
# A step of fewer grey levels is noise of the compression, not an edge: it counts as none.
_EDGE = 3
# Two hashes of the same picture differ in at most so many of 128 bits; with one band more than
# that, one band at least is equal, which is how pairs are found without comparing all.
TOLERANCE = 7
_BANDS = TOLERANCE + 1
# The small pictures may differ by so much, on average and anywhere (of 255).
_MEAN, _MOST = 3.5, 16
# The finer pictures may differ by so much of what stands out from their ground. Photographs and
# pages at half the size or at quality 30 differ by up to 0.05, grainy pictures of 48 pixels by 0.1;
# other pages of five lines by 0.126 and more, other photographs by 0.5.
_SHARE = 0.11
# What stands out, in grey levels on average, is too little to tell by: a line on a page. Such
# pictures may differ by what JPEG changes in an even ground.
_NOTHING, _GRAIN = 1.0, 2


class PictureHash(NamedTuple):
    """`bits` uint64[2], `small` uint8[8, 8, 3] and `fine` uint8[24, 24] of one picture."""

    bits: Bits
    small: Small
    fine: Small


def hash_picture(image: PIL.Image.Image) -> PictureHash:
    """An upright RGB picture's hash."""
    # All sizes divide 72, so one pass over the large picture serves all.
    middle = image.resize((_MIDDLE, _MIDDLE), PIL.Image.Resampling.BILINEAR)
    levels = middle.convert("L")
    grey = np.asarray(levels.reduce(_MIDDLE // (SIDE + 1))).astype(np.int16)
    edges = [
        grey[:SIDE, 1:] > grey[:SIDE, :-1] + _EDGE,
        grey[1:, :SIDE] > grey[:-1, :SIDE] + _EDGE,
    ]
    bits = np.packbits(np.stack(edges).reshape(2, -1), axis=1).view(np.uint64).reshape(2)
    small = middle.reduce(_MIDDLE // SIDE)
    return PictureHash(bits, np.asarray(small), np.asarray(levels.reduce(_MIDDLE // FINE)))


def stack(hashes: list[PictureHash]) -> PictureHash:
    """Hashes of N pictures as uint64[N, 2], uint8[N, 8, 8, 3] and uint8[N, 24, 24]."""
    if not hashes:
        return PictureHash(
            np.empty((0, 2), "u8"),
            np.empty((0, SIDE, SIDE, 3), "u1"),
            np.empty((0, FINE, FINE), "u1"),
        )
    return PictureHash(*(np.stack(parts) for parts in zip(*hashes, strict=True)))


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
        piece = piece[(gap.mean(axis=1) <= _MEAN) & (gap.max(axis=1) <= _MOST)]
        one, other = (hashes.fine[piece[:, k]].astype(np.int16) for k in (0, 1))
        kept.append(piece[_alike(one.reshape(-1, FINE**2), other.reshape(-1, FINE**2))])
    return np.concatenate(kept) if kept else pairs


def _alike(one: Grey, other: Grey) -> Flags:
    """int16[pairs, 576] twice -> bool[pairs]: little differs, by what stands out of each."""
    left, right = _standing_out(one), _standing_out(other)
    least = np.minimum(np.abs(left).mean(axis=1), np.abs(right).mean(axis=1))
    # JPEG makes thin dark lines on white paler, all of them alike.
    paler = (left * right).sum(axis=1) / np.maximum((right * right).sum(axis=1), 1)
    apart = np.abs(left - paler[:, None] * right).mean(axis=1)
    equal = (np.abs(left - right) <= _GRAIN).all(axis=1)
    alike: Flags = equal | ((least >= _NOTHING) & (apart <= _SHARE * least))
    return alike


def _standing_out(grey: Grey) -> Levels:
    """How far the levels lie from the ground, float64[pairs, 576]."""
    found: Levels = grey - np.median(grey, axis=1, keepdims=True)
    return found
