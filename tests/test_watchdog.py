"""A step that hangs ends the run and names its samples."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from pumice.train import trainer
from pumice.train.fingerprint import spec_fingerprint
from pumice.train.stages import run_stage
from pumice.train.watchdog import Watchdog
from pumice.world.datasets import make_world
from stage_specs import align_spec

SOON = 0.4 / 60


def test_a_step_that_hangs_ends_the_run_with_its_samples(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_world(tmp_path / "world", images=8, eval_images=1)
    vision, language = tiny.vision_folder(tmp_path / "v"), tiny.language_folder(tmp_path / "l")
    spec = align_spec(vision, language, tmp_path / "world", steps=2)
    ended: list[int] = []
    seen: list[str] = []
    step = trainer.Trainer._step

    def hanging(self: trainer.Trainer, number: int, batches: Any) -> dict[str, Any]:
        if number == 1:
            seen.extend(name for batch in batches for name in batch.sample_ids)
            deadline = time.monotonic() + 20
            while not ended and time.monotonic() < deadline:
                time.sleep(0.01)
        return step(self, number, batches)

    # The first step pays for what is done once, and must not count as a hang.
    monkeypatch.setattr(Watchdog, "at", _later(Watchdog.at))
    monkeypatch.setattr(trainer.Trainer, "_step", hanging)
    monkeypatch.setattr(os, "_exit", ended.append)
    watched = dataclasses.replace(spec, watchdog_minutes=SOON)
    assert spec_fingerprint(watched) == spec_fingerprint(spec)
    run_stage(watched, tmp_path / "out")
    assert ended and ended[0] == 1
    record = json.loads((tmp_path / "out/align.stuck.rank-0.json").read_text())
    assert (record["step"], record["samples"]) == (2, seen) and len(seen) == 4
    assert "stage 'align' is stuck: process 0 has been computing" in caplog.text
    assert seen[0] in caplog.text


def _later(at: Any) -> Any:
    def begun(self: Watchdog, step: int, doing: str, samples: Any) -> None:
        if step > 0:
            at(self, step, doing, samples)

    return begun


def test_without_minutes_nothing_is_watched(tmp_path: Path) -> None:
    with Watchdog(None, "align", 0, tmp_path / "record.json") as watchdog:
        watchdog.at(0, "computing", list)
        assert not watchdog._thread.is_alive()
