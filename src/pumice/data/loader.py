"""Batches by step number: the batch of a step depends on the seed and the step, on nothing else.

So a run resumes at any step by asking for it, and the number of threads changes no batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pumice.core.errors import PumiceError
from pumice.core.log import get_logger
from pumice.core.types import Sample
from pumice.data.blocks import Numbers
from pumice.data.mixture import Mixture, shuffled

if TYPE_CHECKING:
    from pumice.processing.collate import Batch
    from pumice.processing.processor import Encoded

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

    def encode(self, sample: Sample, max_tokens: int | None = None) -> Encoded: ...


class Loader:
    """Batches of a mixture.

    `batch_size` counts the rows of one step over all processes, so that the number of processes
    changes no step; each takes its share. An epoch has ceil(rows / batch_size) steps; its last
    batch is filled up with rows of the next epoch.
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
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        collate: Collate | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise PumiceError(
                f"batch_size is {batch_size} for {world_size} processes; a positive multiple of "
                f"the number of processes is allowed, as each takes an equal share. Change either."
            )
        if workers < 0:
            raise PumiceError(f"workers is {workers}; 0 (no threads) or more are allowed.")
        self.mixture, self.processor = mixture, processor
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.group_by_length, self.max_tokens = group_by_length, max_tokens
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
        """(index of the source, row) of this process's rows of a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        window, place = divmod(step_in_epoch, WINDOW)
        return self._batches(epoch, window)[place][self.rank :: self.world_size]

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, for this process."""
        return self._make(self.rows_at(step))

    def iterate(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """The batches of `num_steps` steps from `start_step` on, prepared ahead by threads.

        A row that cannot be used raises at its own step, after the batches before it.
        """
        steps = range(start_step, start_step + num_steps)
        if self.workers == 0:
            yield from map(self.batch_at, steps)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="pumice-loader")
        ahead: deque[Future[Batch]] = deque()
        try:
            for step in steps:
                ahead.append(pool.submit(self._make, self.rows_at(step)))
                if len(ahead) > self.workers + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, rows: list[Row]) -> Batch:
        return self._collate_with(self._encode(*row) for row in rows)

    def _collate_with(self, encoded: Iterator[Encoded]) -> Batch:
        if self._collate is None:
            # At the first batch, because it brings torch with it.
            from pumice.processing.collate import collate

            self._collate = collate
        return self._collate(list(encoded), self.processor.pad_id)

    def _encode(self, source: int, row: int) -> Encoded:
        sample = self.mixture.parts[source].source[row]
        return self.processor.encode(sample, self.max_tokens)

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
            if self.group_by_length:
                rows.sort(key=lambda row: (self._length(row), row))
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            if self.group_by_length:
                places = shuffled(len(batches), self.seed, "batches", epoch, window)
                batches = [batches[place] for place in places.tolist()]
            self._window = ((epoch, window), batches)
        return self._window[1]

    def _length(self, row: Row) -> float:
        """About how many tokens; an image counts as one view, since its size is in its file."""
        characters, images = self.mixture.parts[row[0]].source.size(row[1])
        return characters / CHARACTERS_PER_TOKEN + images * self.processor.image_tokens
