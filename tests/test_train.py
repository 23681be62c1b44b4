"""Training: what moves, exact resume, equal seeds, and errors that stop a run."""

import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import tiny
from pumice.core.errors import PumiceError
from pumice.core.interrupts import take_ctrl_c
from pumice.data.packing import Packing
from pumice.models import checkpoint
from pumice.models.checkpoint import load_lmm
from pumice.train import state, trainer
from pumice.train.fingerprint import spec_record
from pumice.train.metrics import part_hash
from pumice.train.optim import learning_rate_factor
from pumice.train.stages import DataSpec, StageSpec, run_stage
from pumice.world.datasets import make_world
from stage_specs import align_spec, tune_spec


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, images=24, eval_images=4)
    return folder


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    return tiny.vision_folder(folder / "vision"), tiny.language_folder(folder / "language")


@pytest.fixture
def spec(world: Path, backbones: tuple[Path, Path]) -> StageSpec:
    return align_spec(*backbones, world, save_every=2)


def hashes(checkpoint: Path) -> dict[str, str]:
    lmm = load_lmm(checkpoint)
    return {name: part_hash(getattr(lmm, name)) for name in ("vision", "connector", "language")}


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_align_moves_the_connector_and_tune_also_the_language_model(
    spec: StageSpec, world: Path, tmp_path: Path
) -> None:
    start = hashes(run_stage(dataclasses.replace(spec, steps=1, name="one"), tmp_path).checkpoint)
    align = hashes(run_stage(spec, tmp_path).checkpoint)
    assert align["vision"] == start["vision"] and align["language"] == start["language"]
    assert align["connector"] != start["connector"]
    tune = hashes(run_stage(tune_spec(spec, world, tmp_path / "align"), tmp_path).checkpoint)
    assert tune["vision"] == align["vision"]
    assert tune["connector"] != align["connector"] and tune["language"] != align["language"]
    record = json.loads((tmp_path / "tune" / "training.json").read_text())
    assert {n: p["moved"] for n, p in record["parts"].items()} == {
        "vision": False, "connector": True, "language": True,
    }  # fmt: skip


def test_equal_seeds_give_equal_runs_and_threads_change_nothing(
    spec: StageSpec, tmp_path: Path
) -> None:
    one = run_stage(spec, tmp_path / "one").checkpoint
    two = run_stage(dataclasses.replace(spec, workers=3), tmp_path / "two").checkpoint
    other = run_stage(dataclasses.replace(spec, seed=1), tmp_path / "other").checkpoint
    assert hashes(one) == hashes(two)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert hashes(one)["connector"] != hashes(other)["connector"]


def stop_after(
    monkeypatch: pytest.MonkeyPatch, step: int, by: signal.Signals = signal.SIGTERM
) -> None:
    """The process gets a signal while it works on this step."""
    original = trainer.Trainer._step

    def stepping(self, number, batch):  # type: ignore[no-untyped-def]
        row = original(self, number, batch)
        if number + 1 == step:
            os.kill(os.getpid(), by)
        return row

    monkeypatch.setattr(trainer.Trainer, "_step", stepping)


@pytest.mark.parametrize(
    "pieces",
    [{}, {"packing": Packing(512, tiles=2)}, {"micro_batch_size": 2}],
    ids=["whole", "packed", "accumulated"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    pieces: dict[str, Any],
    spec: StageSpec,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    init = run_stage(spec, tmp_path / "whole").checkpoint
    tune = tune_spec(spec, world, init, **pieces)
    whole = run_stage(tune, tmp_path / "whole").checkpoint
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit, match="stopped after step 3"):
            run_stage(tune, tmp_path / "stopped")
    resumed = run_stage(tune, tmp_path / "stopped")
    assert resumed.resumed_from == 3
    assert hashes(resumed.checkpoint) == hashes(whole)
    tail = losses(tmp_path / "whole")[-6:]
    assert losses(tmp_path / "stopped") == tail
    assert not (tmp_path / "stopped" / "tune.states").exists()


def test_a_damaged_last_state_falls_back_to_the_one_before(
    spec: StageSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = run_stage(spec, tmp_path / "whole").checkpoint
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(SystemExit):
            run_stage(spec, tmp_path / "stopped")
    states = sorted((tmp_path / "stopped" / "align.states").glob("step_*"))
    assert [state.name for state in states] == ["step_00000004", "step_00000005"]
    (tmp_path / "other").mkdir()
    shutil.copytree(states[0].parent, tmp_path / "other" / "align.states")
    (tmp_path / "other" / "align.states" / "step_00000005" / "state.json").write_text("{}")
    assert run_stage(spec, tmp_path / "other").resumed_from == 4
    tensors = states[-1] / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    resumed = run_stage(spec, tmp_path / "stopped")
    assert resumed.resumed_from == 4
    assert "damaged" in caplog.text
    assert hashes(resumed.checkpoint) == hashes(whole)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_finished_stage_is_not_trained_again_and_another_recipe_is_refused(
    spec: StageSpec, tmp_path: Path
) -> None:
    run_stage(spec, tmp_path)
    before = (tmp_path / "align" / "model.safetensors").stat().st_mtime_ns
    run_stage(spec, tmp_path)
    assert (tmp_path / "align" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(PumiceError, match="another recipe"):
        run_stage(dataclasses.replace(spec, batch_size=8), tmp_path)


def moved(
    spec: StageSpec, world: Path, backbones: tuple[Path, Path], to: Path, out: Path
) -> StageSpec:
    """The same stage after data, backbones and output were copied elsewhere."""
    shutil.copytree(world / "llava", to / "texts")
    vision, language = (shutil.copytree(b, to / "models" / b.name) for b in backbones)
    data = tuple(
        dataclasses.replace(d, path=to / "texts" / d.path.name, images=world / "images")
        for d in spec.data
    )
    init = None if spec.init is None else out / spec.init.name
    return dataclasses.replace(spec, vision=(vision,), language=language, data=data, init=init)


def test_finished_and_stopped_stages_are_known_again_elsewhere(
    spec: StageSpec,
    world: Path,
    backbones: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    align = run_stage(spec, here)
    tune = tune_spec(spec, world, here / "align")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit):
            run_stage(tune, here)
    here.rename(there)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    new = moved(spec, world, backbones, tmp_path / "new", there)
    relative = dataclasses.replace(new, vision=(Path("../new/models/vision"),))
    assert run_stage(relative, Path("../there")).final_loss == align.final_loss
    new_tune = moved(tune, world, backbones, tmp_path / "newer", there)
    assert run_stage(new_tune, there).resumed_from == 3


def test_other_content_is_refused(
    spec: StageSpec, world: Path, backbones: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_stage(spec, out)
    new = moved(spec, world, backbones, tmp_path / "new", out)
    run_stage(new, out)
    for path in (new.data[0].path, new.language / "tokenizer_config.json"):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        with pytest.raises(PumiceError, match="other data or other backbones"):
            run_stage(new, out)
        path.write_bytes(before)
    # Another training of the same backbone: a file of the same size.
    tiny.vision_folder(new.vision[0], seed=7)
    with pytest.raises(PumiceError, match="other data or other backbones"):
        run_stage(new, out)


def test_a_stage_from_another_checkpoint_is_refused(
    spec: StageSpec, world: Path, tmp_path: Path
) -> None:
    run_stage(spec, tmp_path)
    tune = tune_spec(spec, world, tmp_path / "align")
    run_stage(tune, tmp_path)
    run_stage(dataclasses.replace(spec, seed=1), tmp_path, resume=False)
    with pytest.raises(PumiceError, match="another recipe"):
        run_stage(tune, tmp_path)


def test_the_record_of_a_stage_holds_no_absolute_path(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_stage(spec, Path("out"))
    text = (tmp_path / "out" / "align" / "training.json").read_text()
    assert '"/' not in text
    record = json.loads(text)["spec"]
    assert record["vision"] == [f".../{spec.vision[0].parent.name}/vision"]
    assert record["data"][0]["path"] == ".../llava/pretrain.json"
    shutil.copytree(spec.data[0].path.parent, tmp_path / "out" / "data" / "llava")
    inside = DataSpec(
        path=Path("out/data/llava/pretrain.json"), images=spec.data[0].images, weight=None
    )
    told = spec_record(dataclasses.replace(spec, data=(inside,)), tmp_path / "out")
    assert told["data"][0]["path"] == "data/llava/pretrain.json"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pumice.models.lmm import LMM

    original = LMM.loss

    def broken(self, batch, features=None):  # type: ignore[no-untyped-def]
        loss, count = original(self, batch, features)
        return loss * float("nan"), count

    monkeypatch.setattr(LMM, "loss", broken)
    with pytest.raises(PumiceError, match=r"stopped at step 1.*align\.not_finite\.json"):
        run_stage(spec, tmp_path)
    assert len(json.loads((tmp_path / "align.not_finite.json").read_text())["samples"]) == 4


def test_a_step_that_does_not_fit_names_its_samples(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pumice.models.lmm import LMM

    def full(self, batch, features=None):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LMM, "loss", full)
    with pytest.raises(PumiceError, match=r"out of memory at step 1, .* 4 x \d+ tokens with 4 vie"):
        run_stage(spec, tmp_path)


def test_an_unknown_part_is_refused(spec: StageSpec, tmp_path: Path) -> None:
    with pytest.raises(PumiceError, match="projector.*vision, connector, language"):
        run_stage(dataclasses.replace(spec, train={"projector": 1e-3}), tmp_path)


def test_text_only_data_trains_without_any_image(spec: StageSpec, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]
    rows = [{"id": str(n), "conversations": turns} for n in range(4)]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    data = (DataSpec(path=tmp_path / "text.json", images=tmp_path),)
    text = dataclasses.replace(
        spec, data=data, template="vicuna_v1", train={"language": 1e-2}, steps=3
    )
    run_stage(text, tmp_path)
    found = losses(tmp_path)
    assert found[-1] < found[0]


def test_what_looks_at_images_does_not_train_on_text_alone(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    data = (DataSpec(path=tmp_path / "text.json", images=None),)
    text = dataclasses.replace(spec, data=data, template="vicuna_v1")
    # Before a step is taken, and not when the stage is over.
    monkeypatch.setattr(trainer.Trainer, "_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(PumiceError, match="trains connector, and none of its 1 rows has an image"):
        run_stage(text, tmp_path)


def test_a_part_that_was_to_learn_and_did_not_is_told(spec: StageSpec, tmp_path: Path) -> None:
    small = dataclasses.replace(spec, train={"connector": 1e-30}, steps=2)
    with pytest.raises(PumiceError, match=r"was to train connector.*\{'connector': 1e-30\}"):
        run_stage(small, tmp_path)
    assert not (tmp_path / "align").exists()


def test_a_full_disk_keeps_the_checkpoint_before_and_the_states(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(PumiceError, match="align could not be written .*No space left"):
            run_stage(spec, tmp_path)
    assert run_stage(spec, tmp_path).resumed_from == 4


def test_a_state_that_does_not_fit_on_the_disk_says_so_without_a_stack(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.FileSystemWriter, "write_data", full)
    with pytest.raises(PumiceError, match="state after step 2 could not.*No space left") as told:
        run_stage(spec, tmp_path)
    assert "Traceback" not in str(told.value)


def test_schedule_matches_the_reference_numbers() -> None:
    # LLaVA-1.5's tune stage: 5198 steps, warm-up ceil(0.03 * 5198) = 156, cosine to zero.
    factors = [learning_rate_factor(step, 5198, 0.03, "cosine") for step in range(5198)]
    assert factors[0] == 0.0 and factors[156] == 1.0 and factors[78] == 0.5
    assert factors[(156 + 5198) // 2] == pytest.approx(0.5, abs=1e-3)
    assert 0 < factors[-1] < 1e-6


def test_training_in_a_thread_leaves_signals_alone(spec: StageSpec, tmp_path: Path) -> None:
    thread = threading.Thread(target=run_stage, args=(spec, tmp_path))
    thread.start()
    thread.join()
    assert (tmp_path / "align" / "training.json").is_file()


def test_the_loss_is_the_mean_over_supervised_tokens_of_the_whole_batch(
    spec: StageSpec, tmp_path: Path
) -> None:
    from pumice.train.build import build_loader, build_model, build_processor

    lmm, _ = build_model(spec)
    loader = build_loader(spec, build_processor(spec, lmm))
    batch = loader.micro_batches_at(0)[0]
    with torch.no_grad():
        together, count = lmm.loss(batch)
        logits = lmm(batch.input_ids, batch.position_ids, batch.pixel_values).float()
    log_probabilities = logits[:, :-1].log_softmax(-1)
    targets = batch.labels[:, 1:]
    picked = log_probabilities.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = -picked[targets >= 0]
    assert count == len(expected) == batch.num_supervised
    assert torch.allclose(together, expected.sum(), rtol=1e-5)


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """Ctrl-C as Python takes it; a shell has it ignored by what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_saves_once_and_a_second_one_stops_at_once(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, by=signal.SIGINT)
        with pytest.raises(SystemExit, match="stopped after step 2"):
            run_stage(spec, tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is before
    resumed = run_stage(spec, tmp_path / "out")
    assert resumed.resumed_from == 2
    assert hashes(resumed.checkpoint) == hashes(run_stage(spec, tmp_path / "whole").checkpoint)
    with monkeypatch.context() as patch:
        for step in (1, 1):
            stop_after(patch, step, by=signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run_stage(spec, tmp_path / "twice")


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_of_the_command_line_saves_too(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_ctrl_c()
    taken = signal.getsignal(signal.SIGINT)
    stop_after(monkeypatch, 1, by=signal.SIGINT)
    with pytest.raises(SystemExit, match="stopped after step 1"):
        run_stage(spec, tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is taken is not signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_or_taken_stays_so(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop_after(monkeypatch, 1, by=signal.SIGINT)
        assert run_stage(spec, tmp_path / "out").steps == spec.steps
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
