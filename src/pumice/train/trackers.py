"""Where the rows of metrics.jsonl also go, if asked: TensorBoard, Weights & Biases.

A tracker is a line of `TRACKERS` and a class with `write` and `close`. Its package is imported when
it is asked for; whatever it does, metrics.jsonl is written.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pumice.core.errors import PumiceError
from pumice.core.files import write_atomic
from pumice.core.registry import Registry


class Tracker(Protocol):
    """Gets each row of a stage as it is written."""

    def write(self, row: dict[str, Any]) -> None:
        """One row; its `step` counts from 1."""

    def close(self) -> None:
        """No row comes any more."""


class TensorBoard:
    """Event files in OUT/tensorboard/STAGE; `tensorboard --logdir OUT/tensorboard` shows them."""

    def __init__(self, out: Path, stage: str, start: int, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a run that was stopped has written beyond its last state is taken back.
        self._writer: Any = SummaryWriter(
            str(out / "tensorboard" / stage), purge_step=start + 1 if start else None, flush_secs=10
        )

    def write(self, row: dict[str, Any]) -> None:
        """The numbers of a row by their names, and the probe's answers as a text."""
        for name, value in scalars(row):
            self._writer.add_scalar(name, value, row["step"])
        for probe in row.get("validation", {}).get("probe", []):
            text = (
                f"{probe['question']}\n\n**said** {probe['said']}\n\n**wanted** {probe['wanted']}"
            )
            self._writer.add_text(f"validation/{probe['id']}", text, row["step"])

    def close(self) -> None:
        """Everything is on disk."""
        self._writer.close()


class WandB:
    """One run of Weights & Biases a stage, in a group named after OUT.

    Project, account and mode come from its own variables: WANDB_PROJECT, WANDB_API_KEY,
    WANDB_MODE=offline.
    """

    def __init__(self, out: Path, stage: str, start: int, config: dict[str, Any]) -> None:
        import os

        import wandb

        # A stage that goes on goes on in the same run.
        kept = out / "wandb" / f"{stage}.id"
        if not (start and kept.is_file()):
            write_atomic(kept, uuid.uuid4().hex[:12])
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "pumice"),
                group=out.resolve().name,
                name=f"{out.resolve().name}/{stage}",
                id=kept.read_text(),
                resume="allow",
                dir=out,
                config=config,
            )
        except wandb.Error as error:
            raise PumiceError(
                f"--track wandb cannot begin: {error} Set WANDB_API_KEY, or WANDB_MODE=offline to "
                f"write the run to {out / 'wandb'} alone; or leave --track wandb out."
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """The numbers of a row by their names."""
        self._run.log(dict(scalars(row)), step=row["step"])

    def close(self) -> None:
        """Waits until everything is sent, or written where it is offline."""
        self._run.finish()


TRACKERS: Registry[tuple[str, Callable[[Path, str, int, dict[str, Any]], Tracker]]] = Registry(
    "--track",
    {
        "tensorboard": ("tensorboard", TensorBoard),
        "wandb": ("wandb", WandB),
    },
)
"""By name: the package it needs, which is also that of the extra, and what writes."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, before anything is made, a name that means nothing or lacks its package."""
    for name in names:
        package, _ = TRACKERS[name]
        if importlib.util.find_spec(package) is None:
            raise PumiceError(
                f"--track {name} needs the package {package}, which is not installed. "
                f"Install it with pip install 'pumice[{name}]', or leave --track {name} out."
            )


def scalars(row: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row of metrics.jsonl: `loss`, `lr/connector`, `validation/gap`, ..."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{above}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield f"{above}{key}", float(value)
