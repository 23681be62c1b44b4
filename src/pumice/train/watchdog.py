"""Ends a run that hangs, and says at which samples; a hang would otherwise cost days in silence."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from pumice.core.files import write_json

log = logging.getLogger(__name__)
EXIT = 1


class Watchdog:
    """A thread that ends the process when nothing has been reported for so many minutes.

    Each process of a training has one. When one of them is stuck the others wait for it, so all
    speak up; what they were doing tells which one it was.
    """

    def __init__(self, minutes: float | None, stage: str, rank: int, record: Path) -> None:
        """`record` is the file that gets step and samples; `minutes` None watches nothing."""
        self.minutes, self.stage, self.rank, self.record = minutes, stage, rank, record
        self._at: tuple[float, int, str, Callable[[], Sequence[str]]] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pumice-watchdog", daemon=True)

    def at(self, step: int, doing: str, samples: Callable[[], Sequence[str]]) -> None:
        """What is begun now; `samples` names the rows it is about, should anybody ask."""
        self._at = (time.monotonic(), step, doing, samples)

    def __enter__(self) -> Watchdog:
        if self.minutes is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        assert self.minutes is not None
        limit = self.minutes * 60
        while not self._over.wait(min(limit / 4, 10)):
            if self._at is not None and time.monotonic() - self._at[0] > limit:
                self._end(*self._at[1:])

    def _end(self, step: int, doing: str, samples: Callable[[], Sequence[str]]) -> None:
        names = list(samples())
        write_json(
            self.record, {"stage": self.stage, "step": step + 1, "doing": doing, "samples": names}
        )
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        log.error(
            "stage %r is stuck: process %d has been %s for more than %g minutes at step %d, with "
            "the samples %s (all of them in %s). The run ends here; look at these samples, or at "
            "the process that is not waiting for the others, and give the same command again to go "
            "on from the last state. Raise watchdog_minutes if a step may take this long.",
            self.stage, self.rank, doing, self.minutes, step + 1, shown, self.record,
        )  # fmt: skip
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        # The main thread does not come back to hear an exception.
        os._exit(EXIT)
