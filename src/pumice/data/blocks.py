"""Rows that lie together in a file, and an order of rows that respects it.

A row of a parquet file or a tar shard is cheap to read beside its neighbours. An order that jumps
between all of them would read every block for every row; this one goes through a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.integer[Any]]]


class Blocks(NamedTuple):
    """`starts` int[blocks]: the first row of each; `together` blocks are mixed at a time."""

    starts: Numbers
    together: int


def blockwise(rows: Numbers, blocks: Blocks, permute: Callable[..., Numbers]) -> Numbers:
    """The rows (ascending) with their blocks in a new order, and mixed within a few of them.

    `permute(size, *key)` gives the numbers below `size` in an order that depends on the key.
    """
    block_of = np.searchsorted(blocks.starts, rows, side="right") - 1
    cuts = np.flatnonzero(np.diff(block_of)) + 1
    pieces = np.split(rows, cuts)
    order = permute(len(pieces), "blocks")
    mixed = []
    for number, first in enumerate(range(0, len(order), blocks.together)):
        near = np.concatenate([pieces[k] for k in order[first : first + blocks.together]])
        mixed.append(near[permute(len(near), "within", number)])
    return np.concatenate(mixed)
