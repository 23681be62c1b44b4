"""Batches by step number: the batch of a step depends on the seed and the step, on nothing else.

So a run resumes at any step by asking for it, and the number of threads changes no batch. A step
may be computed in several micro-batches: packed rows, or a few conversations at a time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pumice.core.errors import PumiceError
from pumice.core.log import get_logger
from pumice.core.types import Sample
from pumice.data.blocks import Numbers
from pumice.data.lengths import RowSizes
from pumice.data.mixture import Mixture, shuffled
from pumice.data.packing import Packing, pack_rows

if TYPE_CHECKING:
    import torch

    from pumice.processing.collate import Batch
    from pumice.processing.encoded import Encoded

log = get_logger(__name__)

# Rows are sorted by length within so many batches: enough for batches of even length, and few
# enough that the order stays random over an epoch.
WINDOW = 50
# For the estimate of a row's length only.
CHARACTERS_PER_TOKEN = 4

Row = tuple[int, int]
Collate = Callable[[list["Encoded"], int], "Batch"]


class Encoder(Protocol):
    """What the loader needs of a processor."""

    @property
    def image_tokens(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    def encode_batch(
        self, samples: Sequence[Sample], max_tokens: int | None = None
    ) -> list[Encoded]: ...


class Loader:
    """Batches of a mixture.

    `batch_size` counts the rows of one step over all processes, so that the number of processes
    changes no step; each takes its share. An epoch has ceil(rows / batch_size) steps; its last
    batch is filled up with rows of the next epoch.

    `packing` lays the rows of a step one after the other into as few rows as its budget allows;
    `micro_batch_size` pads so many at a time. Neither changes which rows a step has.
    `group_by_modality` keeps rows with images and rows without apart, as LLaVA-1.5 does: only the
    batches that take what is left over of both are mixed.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Encoder,
        batch_size: int,
        seed: int,
        *,
        workers: int = 2,
        group_by_length: bool = False,
        group_by_modality: bool = False,
        max_tokens: int | None = None,
        packing: Packing | None = None,
        sizes: RowSizes | None = None,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        collate: Collate | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise PumiceError(
                f"batch_size is {batch_size} for {world_size} processes; a positive multiple of "
                f"the number of processes is allowed, as each takes an equal share. Change either."
            )
        share = batch_size // world_size
        if micro_batch_size is not None and (micro_batch_size < 1 or share % micro_batch_size):
            raise PumiceError(
                f"micro_batch_size is {micro_batch_size} and a process has {share} rows of a step "
                f"(batch_size {batch_size}, {world_size} processes); a divisor of that is allowed."
            )
        if workers < 0:
            raise PumiceError(f"workers is {workers}; 0 (no threads) or more are allowed.")
        self.mixture, self.processor = mixture, processor
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.group_by_length, self.max_tokens = group_by_length, max_tokens
        self.group_by_modality = group_by_modality
        assert (packing is None) == (sizes is None)
        self.packing, self.sizes = packing, sizes
        self.micro_batch_size = micro_batch_size or share
        self.rank, self.world_size = rank, world_size
        self._collate = collate
        self._epoch: tuple[int, Numbers] | None = None
        self._window: tuple[tuple[int, int], list[list[Row]]] | None = None
        filled = self.steps_per_epoch * batch_size - len(mixture)
        if filled:
            log.info("the last batch of an epoch is filled up with %d rows of the next", filled)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row of an epoch was seen."""
        return math.ceil(len(self.mixture) / self.batch_size)

    def rows_at(self, step: int) -> list[Row]:
        """(index of the source, row) of the rows of a step, of all processes."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        window, place = divmod(step_in_epoch, WINDOW)
        return self._batches(epoch, window)[place]

    def micro_batches_at(self, step: int) -> list[Batch]:
        """The batches of a step for this process; every process has as many."""
        return self._make(self.rows_at(step))

    def pixels_at(self, step: int) -> torch.Tensor:
        """float[N, 3, S, S]: the views of a step of all processes, in the order of its rows."""
        from pumice.processing.view_room import in_one

        samples = [self._sample(row) for row in self.rows_at(step)]
        encoded = self.processor.encode_batch(samples, self.max_tokens)
        return in_one([one.pixel_values for one in encoded])

    def iterate(self, start_step: int, num_steps: int) -> Iterator[list[Batch]]:
        """The micro-batches of each of `num_steps` steps, prepared ahead by threads.

        A row that cannot be used raises at its own step, after the batches before it.
        """
        steps = range(start_step, start_step + num_steps)
        try:
            if self.workers == 0:
                yield from map(self.micro_batches_at, steps)
            else:
                yield from self._prepared(steps)
        finally:
            if self.sizes is not None and self.rank == 0:
                self.sizes.keep()

    def _prepared(self, steps: range) -> Iterator[list[Batch]]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="pumice-loader")
        ahead: deque[Future[list[Batch]]] = deque()
        try:
            for step in steps:
                ahead.append(pool.submit(self._make, self.rows_at(step)))
                if len(ahead) > self.workers + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def micro_rows(self, rows: list[Row]) -> list[list[Row]]:
        """The rows of a step, of all processes -> those of each micro-batch of this one."""
        if self.packing is None or self.sizes is None:
            mine, size = rows[self.rank :: self.world_size], self.micro_batch_size
            return [mine[start : start + size] for start in range(0, len(mine), size)]
        packed = pack_rows([self.sizes(row) for row in rows], self.packing, self.world_size)
        return [[rows[place] for place in row] for row in packed[self.rank :: self.world_size]]

    def _make(self, rows: list[Row]) -> list[Batch]:
        return [self._together(some) for some in self.micro_rows(rows)]

    def _together(self, rows: list[Row]) -> Batch:
        # Read once: the images of a row may stand in it, and be most of a shard.
        samples = [self._sample(row) for row in rows]
        encoded = self.processor.encode_batch(samples, self.max_tokens)
        self._check_sizes(rows, encoded)
        if self._collate is None:
            # At the first batch, because it brings torch with it.
            from pumice.processing.collate import collate, collate_packed

            self._collate = collate if self.packing is None else collate_packed
        return self._collate(encoded, self.processor.pad_id)

    def _sample(self, row: Row) -> Sample:
        source, number = row
        return self.mixture.parts[source].source[number]

    def _check_sizes(self, rows: list[Row], encoded: list[Encoded]) -> None:
        if self.sizes is not None:
            for row, one in zip(rows, encoded, strict=True):
                self.sizes.check(row, one)

    def _order(self, epoch: int) -> Numbers:
        """int[rows, 2]: all rows of an epoch, filled up to whole batches."""
        if self._epoch is None or self._epoch[0] != epoch:
            wanted = self.steps_per_epoch * self.batch_size
            rows, following = self.mixture.order_array(epoch), epoch + 1
            while len(rows) < wanted:
                more = self.mixture.order_array(following)[: wanted - len(rows)]
                rows, following = np.concatenate([rows, more]), following + 1
            self._epoch = (epoch, rows)
        return self._epoch[1]

    def _batches(self, epoch: int, window: int) -> list[list[Row]]:
        """The whole batches (of all processes) of one window."""
        if self._window is None or self._window[0] != (epoch, window):
            start = window * WINDOW * self.batch_size
            places = self._order(epoch)[start : start + WINDOW * self.batch_size]
            rows = [(source, row) for source, row in places.tolist()]
            batches = self._grouped(rows)
            if self.group_by_length or self.group_by_modality:
                places = shuffled(len(batches), self.seed, "batches", epoch, window)
                batches = [batches[place] for place in places.tolist()]
            self._window = ((epoch, window), batches)
        return self._window[1]

    def _grouped(self, rows: list[Row]) -> list[list[Row]]:
        """The rows of a window in batches, like with like as far as it is asked for."""
        kinds = [rows]
        if self.group_by_modality:
            shown = [self._source_size(row)[1] > 0 for row in rows]
            kinds = [
                [r for r, has in zip(rows, shown, strict=True) if has is k] for k in (True, False)
            ]
        if self.group_by_length:
            for kind in kinds:
                kind.sort(key=lambda row: (self._length(row), row))
        size = self.batch_size
        whole = [kind[i : i + size] for kind in kinds for i in range(0, len(kind) - size + 1, size)]
        left = [row for kind in kinds for row in kind[len(kind) // size * size :]]
        return whole + [left[i : i + size] for i in range(0, len(left), size)]

    def _length(self, row: Row) -> float:
        """About how many tokens; an image counts as one view, since its size is in its file."""
        characters, images = self._source_size(row)
        return characters / CHARACTERS_PER_TOKEN + images * self.processor.image_tokens

    def _source_size(self, row: Row) -> tuple[int, int]:
        return self.mixture.parts[row[0]].source.size(row[1])
