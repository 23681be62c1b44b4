"""Which rows an epoch holds and in which order: a pure function of the seed and the epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from pumice.core.errors import PumiceError
from pumice.core.files import sha256_bytes
from pumice.data.blocks import Numbers, blockwise
from pumice.data.sources import InBlocks, Source


class Part(NamedTuple):
    """A source and how much of it an epoch holds.

    `cap`: at most so many rows, chosen once by the seed. `weight` w: w times as many rows as there
    are, so 0.5 is half of them and 2 is each twice. `epochs`: the source is gone through so often
    within one epoch of the mixture.
    """

    source: Source
    weight: float | None = None
    cap: int | None = None
    epochs: int = 1


class Mixture:
    """Several sources as one sequence of rows.

    Rows are drawn without replacement: a source at weight 0.5 shows its other half in the next
    epoch, and no row comes again before all others of its source came.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        if not parts:
            raise PumiceError(
                "the mixture has no sources; at least one is needed. Name a data file in the "
                "recipe."
            )
        self.parts = [Part(*part) for part in parts]
        self.seed = seed
        for part in self.parts:
            _check(part)
        self._rows = [self._chosen(index, part) for index, part in enumerate(self.parts)]
        self._counts = [_rows_per_epoch(part, len(rows)) for part, rows in self._pairs()]

    def __len__(self) -> int:
        """Rows of one epoch."""
        return sum(self._counts)

    @property
    def counts(self) -> list[int]:
        """Rows of one epoch of each source."""
        return list(self._counts)

    def order(self, epoch: int) -> list[tuple[int, int]]:
        """(index of the source, row) of every row of an epoch, in order."""
        return [(source, row) for source, row in self.order_array(epoch).tolist()]

    def order_array(self, epoch: int) -> Numbers:
        """The same as int32[rows, 2]: eight bytes a row, where a million tuples take 100 MB."""
        sources, rows = [], []
        for index, count in enumerate(self._counts):
            rows.append(self._drawn(index, epoch * count, count))
            sources.append(np.full(count, index))
        places = shuffled(len(self), self.seed, "order", epoch)
        pairs = np.stack([np.concatenate(sources), np.concatenate(rows)], axis=1)
        pairs = pairs.astype(np.int32)[places]
        for index, part in enumerate(self.parts):
            if isinstance(part.source, InBlocks):
                # Shuffled among the other sources, but still one block after the other.
                pairs[pairs[:, 0] == index, 1] = rows[index]
        return pairs

    def fingerprint(self) -> str:
        """A hash that two mixtures share when they give the same rows in the same order."""
        parts = [
            [part.source.fingerprint(), part.weight, part.cap, part.epochs] for part in self.parts
        ]
        return sha256_bytes(json.dumps([self.seed, parts]).encode())

    def rows_hash(self) -> str:
        """A hash of which rows the first epoch holds, in whatever order: it is the run's data.

        Rows are named by the content of their source and their number in it, so that no row has to
        be read; seed, processes and workers change it only by changing which rows are chosen.
        """
        digest = hashlib.sha256()
        for index, (part, count) in enumerate(zip(self.parts, self._counts, strict=True)):
            digest.update(f"{part.source.fingerprint()} {count} ".encode())
            digest.update(np.sort(self._drawn(index, 0, count)).astype("<i8").tobytes())
        return digest.hexdigest()

    def _pairs(self) -> list[tuple[Part, Numbers]]:
        return list(zip(self.parts, self._rows, strict=True))

    def _chosen(self, index: int, part: Part) -> Numbers:
        size = len(part.source)
        if part.cap is None or part.cap >= size:
            return np.arange(size)
        return np.sort(shuffled(size, self.seed, "cap", index)[: part.cap])

    def _drawn(self, index: int, start: int, count: int) -> Numbers:
        """`count` rows from `start` on, out of an endless row of shuffles of the whole source."""
        rows = self._rows[index]
        first, last = start // len(rows), (start + count - 1) // len(rows)
        rounds = [self._round(index, number) for number in range(first, last + 1)]
        offset = start - first * len(rows)
        return np.concatenate(rounds)[offset : offset + count]

    def _round(self, index: int, number: int) -> Numbers:
        """All rows of a source once, in the order of one round."""
        rows, source = self._rows[index], self.parts[index].source
        if isinstance(source, InBlocks):
            permute = partial(_permuted, (self.seed, "rows", index, number))
            return blockwise(rows, source.blocks, permute)
        return rows[shuffled(len(rows), self.seed, "rows", index, number)]


def _permuted(key: tuple[int | str, ...], size: int, *more: int | str) -> Numbers:
    return shuffled(size, *key, *more)


def shuffled(size: int, *key: int | str) -> Numbers:
    """int[size]: the numbers below `size` in an order that depends on the key alone."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    # RandomState, although old: its numbers are promised never to change with numpy's version,
    # and a run must be resumable after an upgrade.
    state = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
    return state.permutation(size)


def _rows_per_epoch(part: Part, size: int) -> int:
    weight = 1.0 if part.weight is None else part.weight
    count = round(weight * size) * part.epochs
    if count < 1:
        raise PumiceError(
            f"weight {weight} of the {size} rows of {part.source.name} is less than one row; at "
            f"least one is needed. Raise the weight, or take the source out of the recipe."
        )
    return count


def _check(part: Part) -> None:
    name = part.source.name
    if len(part.source) == 0:
        raise PumiceError(f"{name} has no rows; at least one is needed. Take it out of the recipe.")
    if part.weight is not None and not 0 < part.weight < float("inf"):
        raise PumiceError(
            f"the weight of {name} is {part.weight}; a number above 0 is allowed. Take the source "
            f"out of the recipe if it shall not be used."
        )
    if part.cap is not None and part.cap < 1:
        raise PumiceError(
            f"the cap of {name} is {part.cap}; a whole number from 1 is allowed. Take the source "
            f"out of the recipe if it shall not be used."
        )
    if part.epochs < 1:
        raise PumiceError(f"the epochs of {name} are {part.epochs}; 1 or more are allowed.")
