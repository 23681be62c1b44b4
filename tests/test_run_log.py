"""Who follows the rows of a training: the band of its recipe, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import Run
from pumice.core.errors import PumiceError
from pumice.models.checkpoint import load_lmm
from pumice.train import trainer
from pumice.train.loss_band import LossBand
from pumice.train.metrics import part_hash
from pumice.train.run_log import Following
from pumice.train.stages import StageSpec, run_stage
from pumice.train.trackers import check_trackers, scalars
from pumice.train.trainer import Trainer
from pumice.train.validation import ValidationSpec
from pumice.world.datasets import make_world
from stage_specs import align_spec
from test_train import stop_after

# No run is as good as that.
BAND = LossBand(recipe="pocket", seeds=(0, 1, 2), window=2, low=(1e-6,) * 3, high=(1e-3,) * 3)


@pytest.fixture(scope="module")
def spec(folders: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> StageSpec:
    world = tmp_path_factory.mktemp("world")
    make_world(world, images=12, eval_images=1)
    held = ValidationSpec(fraction=0.25, every=3, rows=4, probes=1)
    return align_spec(folders.vision, folders.language, world, validation=held)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stopped_and_resumed(spec: StageSpec, out: Path, following: Following) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit):
            run_stage(spec, out, following=following)
    return run_stage(spec, out, following=following).checkpoint


def test_a_run_outside_of_the_band_is_told_and_computes_the_same(
    spec: StageSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = run_stage(spec, tmp_path / "alone").checkpoint
    with caplog.at_level(logging.WARNING):
        followed = run_stage(spec, tmp_path / "whole", following=Following(band=BAND)).checkpoint
    assert caplog.text.count("is above the band of healthy runs of pocket") == 1
    resumed = stopped_and_resumed(spec, tmp_path / "stopped", Following(band=BAND))
    assert len({part_hash(load_lmm(made).connector) for made in (alone, followed, resumed)}) == 1
    records = [json.loads((made / "training.json").read_text()) for made in (followed, resumed)]
    assert records[0]["loss_band"] == records[1]["loss_band"]
    found = records[0]["loss_band"]
    assert [entry["step"] for entry in found["outside"]] == [2, 4, 6] and found["warning"]
    losses = [row["loss"] for row in rows_of(tmp_path / "whole")]
    assert found["outside"][0]["mean"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-3)
    assert [row["step"] for row in rows_of(tmp_path / "whole") if "loss_band" in row] == [2, 4, 6]
    # What is counted over a stage counts what was done before it was stopped.
    for key in ("supervised_tokens", "final_loss"):
        assert records[0]["result"][key] == records[1]["result"][key]
    spent = sum(row["seconds"] for row in rows_of(tmp_path / "stopped"))
    assert records[1]["result"]["seconds"] >= 0.99 * spent


@pytest.mark.parametrize("resumed", [False, True])
def test_a_spike_stops_before_the_step_is_taken(
    resumed: bool, spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its fifth step the loss is three times what it was; also in a run that went on at four."""
    quick = dataclasses.replace(spec, validation=None)
    whole = run_stage(quick, tmp_path / "whole").checkpoint
    monkeypatch.setattr(trainer, "_USUAL", 3)
    backward, seen = Trainer._backward, [3 if resumed else 0]
    bad = dataclasses.replace(quick, spike=2.0)

    def spiking(self: Trainer, batch: Any, count: float) -> float:
        seen[0] += 1
        return backward(self, batch, count) * (3 if seen[0] == 5 else 1)

    if resumed:
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            with pytest.raises(SystemExit):
                run_stage(bad, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_backward", spiking)
        with pytest.raises(PumiceError, match="stopped at step 5: .*more than 2 times"):
            run_stage(bad, tmp_path / "out")
    kept = json.loads((tmp_path / "out/align.spike.json").read_text())
    assert kept["step"] == 5 and len(kept["samples"]) == quick.batch_size
    # What the step would have moved has not moved: the run goes on as if nothing had been.
    again = run_stage(bad, tmp_path / "out").checkpoint
    assert part_hash(load_lmm(again).connector) == part_hash(load_lmm(whole).connector)


def test_tensorboard_reads_back_what_stands_in_metrics(spec: StageSpec, tmp_path: Path) -> None:
    """Of a stage that was stopped after its last state too: what is done again counts once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    often = dataclasses.replace(spec, save_every=2)
    following = Following(band=BAND, trackers=["tensorboard"])
    step = Trainer._step

    def dying(self: Trainer, number: int, batches: Any) -> dict[str, Any]:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run_stage(often, tmp_path, following=following)
    run_stage(often, tmp_path, following=following)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "align"))
    events.Reload()
    rows = rows_of(tmp_path)
    for name in ("loss", "grad_norm", "lr/connector", "seconds", "tokens"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(row["step"], dict(scalars(row))[name]) for row in rows]
        assert [step for step, _ in told] == [step for step, _ in wanted] == [1, 2, 3, 4, 5, 6]
        assert [v for _, v in told] == pytest.approx([v for _, v in wanted], rel=1e-6)
    assert [event.step for event in events.Scalars("validation/loss")] == [3, 6]
    assert [event.step for event in events.Scalars("loss_band/high")] == [2, 4, 6]
    probe = rows[-1]["validation"]["probe"][0]
    [text] = [tag for tag in events.Tags()["tensors"] if probe["id"] in tag]
    assert probe["wanted"].encode() in events.Tensors(text)[-1].tensor_proto.string_val[0]


def test_wandb_keeps_a_run_offline(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_stage(spec, tmp_path, following=Following(trackers=["wandb"]))
    [kept] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert (tmp_path / "wandb" / "align.id").read_text() in kept.name
    content = kept.read_bytes()
    assert b"grad_norm" in content and b"lr/connector" in content


def test_wandb_without_an_account_says_what_to_set(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def init(**_: object) -> None:
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(PumiceError, match="No API key configured.*WANDB_MODE=offline"):
        run_stage(spec, tmp_path, following=Following(trackers=["wandb"]))


def test_a_tracker_that_cannot_write_is_refused_before_anything_is_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("run", "pocket-quick", "--out", tmp_path / "out", "--track", "tensorbord")
    assert code == 2 and "--track 'tensorbord' is unknown" in err and "tensorboard" in err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PumiceError, match=r"pip install 'pumice\[wandb\]'"):
        check_trackers(["wandb"])


def test_the_numbers_of_a_row_by_name() -> None:
    held = {"gap": None, "loss": 0.4, "image_not_used": False, "probe": []}
    row = {"stage": "tune", "step": 3, "loss": 0.5, "lr": {"connector": 1e-3}, "validation": held}
    assert dict(scalars(row)) == {
        "loss": 0.5, "lr/connector": 1e-3, "validation/loss": 0.4, "validation/image_not_used": 0.0,
    }  # fmt: skip
