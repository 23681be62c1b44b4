"""The processes that share an evaluation: who asks what, and who waits for whom.

`torchrun --nproc-per-node N -m pumice eval ...` starts N of them. They need each other only to
begin and end together; answers travel through files, so a process that dies takes none with it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from pumice.core.errors import PumiceError
from pumice.core.log import get_logger
from pumice.core.processes import joined_processes
from pumice.eval.benchmark import Item

log = get_logger(__name__)


@dataclass(slots=True)
class Ranks:
    """This process among those that share the work; with `size` 1 nothing is waited for."""

    rank: int = 0
    size: int = 1
    _complete: bool = field(default=True, init=False)

    @property
    def is_main(self) -> bool:
        """True in the one process that merges and scores."""
        return self.rank == 0

    def wait(self) -> bool:
        """Waits until all have come here; False when one of them is gone, now or earlier."""
        if self.size > 1 and self._complete:
            import torch.distributed as dist

            try:
                dist.barrier()
            except RuntimeError:
                log.warning("process %d of %d: another one has ended early", self.rank, self.size)
                self._complete = False
        return self._complete

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block is run by the main process, and then by the others."""
        if not self.is_main:
            self.need_all()
        yield
        if self.is_main:
            self.need_all()

    def need_all(self) -> None:
        """Waits as `wait` does; raises when one is gone."""
        if not self.wait():
            raise PumiceError(
                f"process {self.rank} of {self.size} cannot go on, because another one has ended. "
                f"Its own message says why; give the same command again to go on."
            )

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The part of the items this process asks; questions about one image stay together."""
        places: dict[object, int] = {}
        return [
            item
            for item in items
            if places.setdefault(image_of(item), len(places)) % self.size == self.rank
        ]


def image_of(item: Item) -> object:
    """Equal for items that show the same image; a question without one is on its own."""
    return item.image or (item.id,)


def neighbours(items: Sequence[Item]) -> list[Item]:
    """The items so that questions about one image follow each other.

    The engine then has an image's features and the start of its prompt at hand for all of them.
    """
    places: dict[object, int] = {}
    for item in items:
        places.setdefault(image_of(item), len(places))
    return sorted(items, key=lambda item: places[image_of(item)])


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes torchrun has started, connected while the block runs; or this one alone."""
    with joined_processes() as group:
        if group.size == 1:
            yield Ranks()
            return
        # When one process dies, torchrun ends the others with this signal. The block then ends as
        # by an exception, so that the main process still merges what was answered.
        former = signal.signal(signal.SIGTERM, _leave)
        try:
            yield Ranks(group.rank, group.size)
        finally:
            signal.signal(signal.SIGTERM, former)


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
