"""Re-make the shipped pocket backbones from nothing: `pumice world backbones --out DIR`."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.core.log import get_logger
from pumice.core.progress import Progress, progress

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

VISION_STEPS = 7000
LANGUAGE_STEPS = 13000
QUALITY = "quality.json"
SECONDS_BETWEEN_NEWS = 0.5

# What a job tells while it works: the steps done and the loss.
Report = Callable[[int, float], None]
Job = Callable[[Report], None]

log = get_logger(__name__)


def make_backbones(
    out: Path,
    seed: int = 0,
    steps_vision: int | None = None,
    steps_language: int | None = None,
) -> None:
    """Write `pocket-vision` and `pocket-language` to `out`, both trained at the same time.

    Each takes one core, the language model about 40 minutes. `quality.json` in each folder says how
    good it became. When one fails or Ctrl-C is pressed, the other is stopped as well.
    """
    steps = {
        "pocket-vision": steps_vision or VISION_STEPS,
        "pocket-language": steps_language or LANGUAGE_STEPS,
    }
    for name in steps:
        (out / name).mkdir(parents=True, exist_ok=True)
        # Of an earlier run; its absence says that a folder is not finished.
        (out / name / QUALITY).unlink(missing_ok=True)
    jobs: dict[str, Job] = {
        "pocket-vision": partial(_vision, out / "pocket-vision", steps["pocket-vision"], seed),
        "pocket-language": partial(
            _language, out / "pocket-language", steps["pocket-language"], seed
        ),
    }
    with progress(sum(steps.values()), "training the backbones") as bar:
        failed = run_together(jobs, bar)
    if failed:
        raise PumiceError(
            f"training the backbones in {out} failed: {failed}; the lines above say why. Both were "
            "stopped. Remove the cause and give the command again."
        )
    for name in steps:
        log.info("%s: %s", name, read_json(out / name / QUALITY))


def run_together(jobs: dict[str, Job], bar: Progress) -> str:
    """Run each job in a process of its own until all end; gives which failed and how, "" for none.

    No job outlives this call, however it ends.
    """
    # A fresh interpreter for each: threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    news: Queue[tuple[str, int, float]] = context.Queue()
    workers: dict[str, BaseProcess] = {}
    try:
        for name, job in jobs.items():
            workers[name] = context.Process(target=_work, args=(name, job, news), name=name)
            workers[name].start()
        _follow(workers, news, bar)
        failed = {n: w.exitcode for n, w in workers.items() if w.exitcode not in (None, 0)}
    finally:
        _stop(workers)
    return ", ".join(f"{name} ended with exit code {code}" for name, code in failed.items())


def _follow(
    workers: dict[str, BaseProcess], news: Queue[tuple[str, int, float]], bar: Progress
) -> None:
    """Show what the workers tell, until all have ended or one has failed."""
    done = dict.fromkeys(workers, 0)
    while True:
        ended = [worker.exitcode for worker in workers.values()]
        try:
            name, steps, loss = news.get(timeout=0.2)
        except queue.Empty:
            # Only with the queue empty, so that the last news is shown.
            if None not in ended or any(ended):
                return
            continue
        bar.update(steps - done[name], **{name: f"{steps} steps, loss {loss:.3f}"})
        done[name] = steps


def _stop(workers: dict[str, BaseProcess]) -> None:
    for worker in workers.values():
        if worker.is_alive():
            worker.terminate()
    for worker in workers.values():
        worker.join()


def _work(name: str, job: Job, news: Queue[tuple[str, int, float]]) -> None:
    """What a worker process runs. Ctrl-C reaches the parent, which then stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    unsent: list[tuple[str, int, float]] = []
    last = 0.0

    def report(steps: int, loss: float) -> None:
        nonlocal last
        unsent[:] = [(name, steps, loss)]
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_NEWS:
            return
        last = now
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit(f"{name}: the command that started this training is gone")
        news.put(unsent.pop())

    job(report)
    for entry in unsent:
        news.put(entry)


def _vision(folder: Path, steps: int, seed: int, report: Report) -> None:
    _prepare_torch()
    from pumice.world.vision_backbone import train_vision

    train_vision(folder, steps=steps, seed=seed, report=report)


def _language(folder: Path, steps: int, seed: int, report: Report) -> None:
    _prepare_torch()
    from pumice.world.language_backbone import train_language

    train_language(folder, steps=steps, seed=seed, report=report)


def _prepare_torch() -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
