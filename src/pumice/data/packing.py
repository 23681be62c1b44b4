"""Which conversations of a step share a row: as few rows as a budget allows, evenly filled.

A step keeps its conversations and its loss; packing decides only in how many pieces it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pumice.core.errors import DataError


class Size(NamedTuple):
    """What a conversation takes: positions in the language model, views in the vision backbone."""

    tokens: int
    views: int


@dataclass(frozen=True, slots=True)
class Packing:
    """What one row may hold; `tiles` counts views (an image that is not tiled is one)."""

    tokens: int
    tiles: int | None = None

    def holds(self, size: Size) -> bool:
        """Whether a row of this size is within the budget."""
        return size.tokens <= self.tokens and (self.tiles is None or size.views <= self.tiles)


def pack_rows(sizes: Sequence[Size], packing: Packing, multiple: int = 1) -> list[list[int]]:
    """The places of `sizes` in rows, fullest row first; their number is a multiple of `multiple`.

    The longest conversation goes first, each into the row that has the fewest tokens, so that rows,
    and processes that take one each, have about the same to do.
    """
    for place, size in enumerate(sizes):
        if not packing.holds(size):
            raise DataError(
                f"conversation {place} of a step has {size.tokens} tokens and {size.views} views; "
                f"a packed row holds at most {packing.tokens} tokens and {packing.tiles} views. "
                f"Raise packing.tokens or packing.tiles, or take the conversation out of the data."
            )
    count = math.ceil(sum(size.tokens for size in sizes) / packing.tokens)
    if packing.tiles is not None:
        count = max(count, math.ceil(sum(size.views for size in sizes) / packing.tiles))
    count = max(multiple, math.ceil(count / multiple) * multiple)
    while (rows := _fill(sizes, packing, count)) is None:
        count += multiple
    return rows


def _fill(sizes: Sequence[Size], packing: Packing, count: int) -> list[list[int]] | None:
    """`count` rows, or None when the conversations do not fit into them this way."""
    rows: list[list[int]] = [[] for _ in range(count)]
    held = [Size(0, 0)] * count
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place].tokens, place)):
        for row in sorted(range(count), key=lambda row: held[row].tokens):
            together = Size(*(a + b for a, b in zip(held[row], sizes[place], strict=True)))
            if packing.holds(together):
                rows[row].append(place)
                held[row] = together
                break
        else:
            return None
    order = sorted(range(count), key=lambda row: -held[row].tokens)
    return [sorted(rows[row]) for row in order]
