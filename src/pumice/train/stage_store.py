"""Finished stages kept by what they were made from, so that runs which begin alike train it once.

A stage is named by its fingerprint (`train/fingerprint.py`): every setting, and the content of its
data, backbones and starting checkpoint. Nothing is ever out of date.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pumice.core.files import JsonlWriter, read_jsonl
from pumice.train.fingerprint import spec_fingerprint
from pumice.train.metrics import METRICS, keep_until, stage_rows

if TYPE_CHECKING:
    from pumice.train.stages import StageResult, StageSpec

log = logging.getLogger(__name__)
_CHECKPOINT = "checkpoint"
_DONE = "training.json"


class StageStore:
    """A directory of finished stages, which several processes and studies may share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self, spec: StageSpec, out: Path, train: Callable[[], StageResult]) -> StageResult:
        """The stage in `out`/NAME: taken from the store, or trained by `train` and kept there.

        Who needs the same stage at the same time waits for the one who trains it. A stage whose
        adapter lies beside its base is not kept, since it names the base by the way there.
        """
        if spec.lora is not None and spec.lora.save == "adapter":
            return train()
        fingerprint = spec_fingerprint(spec)
        kept = self.directory / fingerprint
        with FileLock(self.directory / f"{fingerprint}.lock"):
            if not (out / spec.name / _DONE).is_file() and kept.is_dir():
                log.info("stage %s is taken from the store, %s", spec.name, fingerprint[:12])
                _take(kept, out, spec.name)
            result = train()
            if not kept.is_dir():
                _keep(result.checkpoint, kept, stage_rows(out / METRICS, spec.name))
        return result


def _keep(checkpoint: Path, kept: Path, rows: list[dict[str, Any]]) -> None:
    """Through a directory of another name, so that what is there is whole."""
    part = kept.with_name(f"{kept.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    _link_tree(checkpoint, part / _CHECKPOINT)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (part / METRICS).write_text("".join(lines), encoding="utf-8")
    part.rename(kept)


def _take(kept: Path, out: Path, name: str) -> None:
    """The stage and its lines of metrics.jsonl; a stopped own attempt at it makes room."""
    shutil.rmtree(out / f"{name}.states", ignore_errors=True)
    keep_until(out / METRICS, name, 0)
    with JsonlWriter(out / METRICS) as writer:
        for _, row in read_jsonl(kept / METRICS):
            writer.write(row)
    # training.json says that a stage is finished, so the directory comes whole and last.
    part = out / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    _link_tree(kept / _CHECKPOINT, part)
    shutil.rmtree(out / name, ignore_errors=True)
    part.rename(out / name)


def _link_tree(source: Path, target: Path) -> None:
    """The same files under another name: without a copy where the file system can do that."""

    def place(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, copy_function=place)
