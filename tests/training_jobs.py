"""Stages that one process and several train alike, with what happens to them on the way."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from pumice.core.errors import PumiceError
from pumice.core.processes import ALONE, Processes
from pumice.models.lmm import LMM
from pumice.train import parallel, trainer
from pumice.train.parallel import whole_tensor
from pumice.train.stages import StageSpec, run_stage
from pumice.train.watchdog import Watchdog


@dataclass(frozen=True)
class Job:
    """A stage; in its `stop_at`-th step the last process gets SIGTERM, or its loss turns NaN.

    In its `stuck_at`-th step the last process does nothing any more, and only that one is watched:
    how long others take says nothing.
    """

    spec: StageSpec
    stop_at: int | None = None
    not_finite: bool = False
    stuck_at: int | None = None


def write_jobs(root: Path, jobs: dict[str, Job]) -> None:
    (root / "jobs.pickle").write_bytes(pickle.dumps(jobs))


def read_jobs(root: Path) -> dict[str, Job]:
    jobs: dict[str, Job] = pickle.loads((root / "jobs.pickle").read_bytes())
    return jobs


def run_job(job: Job, out: Path, group: Processes = ALONE) -> None:
    """Trains the stage; every step's gradients, whole, go to `out`, and how it ended to `end.K`."""
    out.mkdir(parents=True, exist_ok=True)
    with float32(), weights_counted(out, group), gradients_kept(out, group), trouble(job, group):
        end = "finished"
        try:
            run_stage(job.spec, out, group=group)
        except (SystemExit, PumiceError) as error:
            end = f"{type(error).__name__}: {error}"
        (out / f"end.{group.rank}").write_text(end)


def float32() -> Any:
    """Where bfloat16 is native it would be used, and its rounding hide what is to be seen."""
    return mock.patch.object(parallel, "mixed_precision_pays", lambda: False)


@contextlib.contextmanager
def weights_counted(out: Path, group: Processes) -> Iterator[None]:
    """How many weights a process holds when the model is built goes to `held.K`."""
    begin = parallel.SharedModel.__init__

    def counting(self: parallel.SharedModel, lmm: LMM, *args: Any, **more: Any) -> None:
        held = sum(p.numel() for p in lmm.parameters() if p.device.type != "meta")
        (out / f"held.{group.rank}").write_text(str(held))
        begin(self, lmm, *args, **more)

    with mock.patch.object(parallel.SharedModel, "__init__", counting):
        yield


@contextlib.contextmanager
def gradients_kept(out: Path, group: Processes) -> Iterator[None]:
    clip, seen = trainer.Trainer._clip, 0

    def clipping(self: trainer.Trainer) -> float:
        nonlocal seen
        learning = {n: p for n, p in self.lmm.named_parameters() if p.requires_grad}
        own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in learning.items()}
        whole = {n: whole_tensor(g) for n, g in own.items()}
        if group.is_main:
            save_file({n: g.clone() for n, g in whole.items()}, out / f"gradients.{seen}")
        seen += 1
        return clip(self)

    with mock.patch.object(trainer.Trainer, "_clip", clipping):
        yield


@contextlib.contextmanager
def trouble(job: Job, group: Processes) -> Iterator[None]:
    """What happens to the last of the processes in a step."""
    step, loss = trainer.Trainer._step, LMM.loss
    last, now = group.rank == group.size - 1, 0

    def stepping(self: trainer.Trainer, number: int, batches: Any) -> dict[str, Any]:
        nonlocal now
        now = number + 1
        if last and number + 1 == job.stuck_at:
            time.sleep(600)
        row = step(self, number, batches)
        if last and number + 1 == job.stop_at and not job.not_finite:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    def losing(self: LMM, batch: Any, features: Any = None) -> Any:
        value, count = loss(self, batch, features)
        return (
            value * torch.nan if job.not_finite and last and now == job.stop_at else value
        ), count

    at = Watchdog.at

    def watching(self: Watchdog, number: int, *more: Any) -> None:
        if job.stuck_at in (None, number + 1):
            at(self, number, *more)

    with (
        mock.patch.object(Watchdog, "at", watching),
        mock.patch.object(trainer.Trainer, "_step", stepping),
        mock.patch.object(LMM, "loss", losing),
    ):
        yield
