"""Re-make the shipped pocket backbones from nothing: `pumice world backbones --out DIR`."""

from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path

from pumice.core.errors import PumiceError

VISION_STEPS = 7000
LANGUAGE_STEPS = 9000


def make_backbones(
    out: Path,
    seed: int = 0,
    steps_vision: int | None = None,
    steps_language: int | None = None,
) -> None:
    """Write `pocket-vision` and `pocket-language` to `out`, both trained at the same time.

    Each takes one core; about 25 minutes on two idle cores. `quality.json` in each folder says how
    good it became.
    """
    jobs = {
        "pocket-vision": (_vision, steps_vision or VISION_STEPS),
        "pocket-language": (_language, steps_language or LANGUAGE_STEPS),
    }
    # A fresh interpreter for each: threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, (train, steps) in jobs.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        workers[name] = context.Process(target=train, args=(folder, steps, seed), name=name)
        workers[name].start()
    for worker in workers.values():
        worker.join()
    failed = [name for name, worker in workers.items() if worker.exitcode != 0]
    if failed:
        raise PumiceError(
            f"training {' and '.join(failed)} failed; the lines above say why. What finished is in "
            f"{out}. Give the command again once the cause is removed."
        )


def _vision(folder: Path, steps: int, seed: int) -> None:
    _one_thread()
    from pumice.world.vision_backbone import train_vision

    train_vision(folder, steps=steps, seed=seed)


def _language(folder: Path, steps: int, seed: int) -> None:
    _one_thread()
    from pumice.world.language_backbone import train_language

    train_language(folder, steps=steps, seed=seed)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
