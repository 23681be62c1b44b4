"""Runs what a study lacks: several workers, each run by itself, nothing lost at a kill.

A run is a `pumice run` of its own, so it goes on where it was stopped, and one that fails takes no
other with it. Whoever works on a run holds its lock; a second study that needs it does its other
runs first, and waits then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from pumice.core.log import get_logger
from pumice.core.progress import progress
from pumice.study.cells import Cell, in_running_order
from pumice.study.store import MakeWorld, Store

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One `pumice run` to be started."""

    key: str
    recipe: Path
    out: Path
    log: Path
    stages: Path
    features: Path | None
    features_gb: float | None


class Stopped(Exception):
    """A job was ended from outside; it has neither finished nor failed."""


class Launch(Protocol):
    """How runs are started."""

    def __call__(self, job: Job) -> str | None:
        """Runs a job to its end; gives what went wrong, None when nothing did."""

    def stop(self) -> None:
        """Ends what runs, from another thread; each call that runs then raises `Stopped`."""


def run_missing(
    cells: Sequence[Cell],
    store: Store,
    launch: Launch,
    make_world: MakeWorld,
    *,
    workers: int = 1,
    features_gb: float | None = None,
) -> None:
    """Every run that is not finished in the store; one that failed before is tried again."""
    waiting = [cell for cell in in_running_order(cells) if store.state(cell.key) != "done"]
    if not waiting:
        return
    worker = _Worker(store, launch, features_gb)
    # Before the workers, which would make the same world at the same time.
    files = [store.prepare(cell.key, cell.recipe, make_world) for cell in waiting]
    with progress(len(waiting), "runs") as bar, ThreadPoolExecutor(workers) as pool:
        whole = False
        try:
            todo = list(zip(waiting, files, strict=True))
            # What others work on comes last: until then there is enough to do beside them.
            for wait in (False, True):
                jobs = {pool.submit(worker.work, *run, wait=wait): run for run in todo}
                todo = []
                for job in as_completed(jobs):
                    if job.result():
                        bar.update(1)
                    else:
                        todo.append(jobs[job])
            whole = True
        finally:
            if not whole:
                # Ctrl-C, or our own fault: what runs is stopped, and the rest does not begin.
                pool.shutdown(wait=False, cancel_futures=True)
                launch.stop()


@dataclass(frozen=True, slots=True)
class _Worker:
    store: Store
    launch: Launch
    features_gb: float | None

    def work(self, cell: Cell, recipe: Path, *, wait: bool) -> bool:
        """One run, unless somebody else has finished it in the meantime.

        False, and nothing done, while somebody else works on it and we do not `wait`.
        """
        try:
            with FileLock(self.store.lock(cell.key), timeout=-1 if wait else 0):
                if self.store.state(cell.key) != "done":
                    self._run(cell, recipe)
        except Timeout:
            return False
        return True

    def _run(self, cell: Cell, recipe: Path) -> None:
        store, key, name = self.store, cell.key, f"{cell.arm.name}, seed {cell.seed}"
        log.info("%s begins (%s)", name, key)
        start = time.monotonic()
        error = self.launch(
            Job(
                key,
                recipe,
                store.run(key),
                store.log(key),
                store.stages,
                None if self.features_gb is None else store.features,
                self.features_gb,
            )
        )
        if error is None:
            store.finish(key, time.monotonic() - start)
        else:
            log.warning("%s failed: %s", name, error)
            store.fail(key, error)
