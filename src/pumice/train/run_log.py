"""What a stage writes of its steps, as they are done: metrics.jsonl, and who else follows it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.core.files import JsonlWriter
from pumice.train.fingerprint import spec_record
from pumice.train.loss_band import LossBand, LossWatch
from pumice.train.metrics import METRICS, keep_until, stage_rows
from pumice.train.trackers import TRACKERS

if TYPE_CHECKING:
    from pumice.train.stages import StageSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """Who looks at the rows of a stage; nothing that is trained depends on it."""

    band: LossBand | None = None
    """Where the loss of healthy runs lies."""
    trackers: Sequence[str] = ()
    """Names of `trackers.TRACKERS`."""


class RunLog:
    """The rows of one stage, of which those after step `start` are written anew."""

    def __init__(self, out: Path, spec: StageSpec, start: int, following: Following) -> None:
        keep_until(out / METRICS, spec.name, start)
        self.earlier = stage_rows(out / METRICS, spec.name)
        """The rows of the steps before."""
        self._watch: LossWatch | None = None
        if following.band is not None:
            self._watch = LossWatch(following.band, spec.name, self.earlier)
        with ExitStack() as opened:
            self._jsonl = opened.enter_context(JsonlWriter(out / METRICS))
            record = spec_record(spec, out)
            self._trackers = [
                TRACKERS[name][1](out, spec.name, start, record) for name in following.trackers
            ]
            for tracker in self._trackers:
                opened.callback(tracker.close)
            self._opened = opened.pop_all()

    def write(self, row: dict[str, Any]) -> None:
        """A row a step; the band's finding is added to it at the end of a window."""
        found = self._watch and self._watch(row["step"], row["loss"])
        if found is not None:
            row = {**row, "loss_band": found}
        self._jsonl.write(row)
        for tracker in self._trackers:
            tracker.write(row)

    def summary(self) -> dict[str, Any]:
        """For training.json."""
        return {} if self._watch is None else {"loss_band": self._watch.summary()}

    def close(self) -> None:
        """No row comes any more."""
        self._opened.close()
