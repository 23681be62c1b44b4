"""Two processes train as one does: gradients, losses and weights, whatever each of them sees."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from launch import ended, started_together
from pumice.core.processes import Processes
from pumice.data.packing import Packing
from pumice.processing.processor import Processor
from pumice.train.adapters import LoraTraining
from pumice.train.build import build_loader, stage_processor
from pumice.train.stages import DataSpec
from pumice.train.validation import ValidationSpec
from pumice.world.datasets import make_world
from stage_specs import align_spec, tune_spec
from training_jobs import Job, run_job, write_jobs

SCRIPT = Path(__file__).with_name("train_rank.py")
TURNS = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes, the red circle."}]
# Alike for one process and for two.
ALIKE = ("align", "vision", "gated", "lora", "int8", "tiles", "2x2", "4x1")


def mixed_data(world: Path, file: Path) -> DataSpec:
    """As many conversations with an image as without."""
    rows = json.loads((world / "llava/instruct.json").read_text())
    shown = [row for row in rows if "image" in row][:6]
    text = [{"id": f"text {n}", "conversations": TURNS * (n % 3 + 1)} for n in range(6)]
    file.write_text(json.dumps([row for pair in zip(shown, text, strict=True) for row in pair]))
    return DataSpec(path=file, images=world / "images")


def jobs_of(root: Path) -> dict[str, Job]:
    world = root / "world"
    make_world(world, images=24, eval_images=4)
    vision, language = tiny.vision_folder(root / "vision"), tiny.language_folder(root / "language")
    align = align_spec(vision, language, world, save_every=2, warmup=0.0, steps=4)
    run_job(Job(dataclasses.replace(align, steps=1)), root / "first")
    tune = tune_spec(align, world, root / "first/align")
    text = {"data": (mixed_data(world, root / "mixed.json"),), "batch_size": 2}
    chat = {"template": "vicuna_v1", "system": ""}
    every = dict.fromkeys(("vision", "connector", "language"), 1e-3)
    gated = {"connector": "gated_cross_attention", "connector_options": {"every": 1, "queries": 4}}
    tiles = {"image_mode": "hd", "tiling": {"max_tiles": 4}, "micro_batch_size": 1}
    held = ValidationSpec(fraction=0.4, every=2, rows=5, probes=3)
    specs: dict[str, dict[str, Any]] = {
        "align": {**text, **chat, "validation": held},
        "vision": {
            **text,
            **chat,
            "train": every,
            "checkpointing": "blocks",
            "steps": 3,
            "validation": held,
        },
        "gated": {
            **text,
            **chat,
            **gated,
            "train": {"connector": 1e-2},
            "steps": 3,
            "validation": held,
        },
        "tiles": {**chat, **tiles, "data": tune.data, "steps": 2},
    }
    tunes: dict[str, dict[str, Any]] = {
        "lora": {"packing": Packing(512, tiles=2), "lora": LoraTraining(r=4, alpha=8.0)},
        "int8": {"lora": LoraTraining(r=4, alpha=8.0, quantize="int8", save="adapter"), "steps": 2},
        "1x4": {},
        "2x2": {"micro_batch_size": 2},
        "4x1": {"micro_batch_size": 1},
    }
    made = {name: Job(dataclasses.replace(align, **change)) for name, change in specs.items()}
    made |= {name: Job(dataclasses.replace(tune, **change)) for name, change in tunes.items()}
    made["halved"] = made["2x2"]
    made["stopped"] = Job(made["2x2"].spec, stop_at=3)
    made["broken"] = Job(made["2x2"].spec, stop_at=2, not_finite=True)
    watched = dataclasses.replace(made["2x2"].spec, watchdog_minutes=3 / 60)
    made["stuck"] = Job(watched, stuck_at=4)
    return made


@pytest.fixture(scope="module")
def jobs() -> dict[str, Job]:
    return {}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, jobs: dict[str, Job]) -> Path:
    """What one process made of each job, and what two did."""
    root = tmp_path_factory.mktemp("ranks")
    jobs |= jobs_of(root)
    for name in (*ALIKE, "1x4"):
        run_job(jobs[name], root / "ranks-1" / name)
    # What one process leaves unfinished, with its last state damaged, two go on with.
    run_job(jobs["stopped"], root / "ranks-2/halved")
    tensors = root / "ranks-2/halved/tune.states/step_00000003/__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    write_jobs(root, jobs)
    names = [*ALIKE, "halved", "stopped", "broken", "stuck"]
    together = started_together(2, SCRIPT, root, *names)
    # The last one does not come back, and ends the processes.
    (_, waiting), (code, stuck) = ended(together)
    assert code == 1, waiting + stuck
    (root / "stuck.log").write_text(stuck)
    return root


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = out.glob("*/model.safetensors")
    return load_file(file)


def gradients(out: Path) -> list[torch.Tensor]:
    """All gradients of each step, end to end."""
    files = sorted(out.glob("gradients.*"), key=lambda file: int(file.suffix[1:]))
    return [torch.cat([g.flatten() for g in load_file(file).values()]) for file in files]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm().clamp_min(1e-30))


def assert_same_run(one: Path, other: Path) -> None:
    """The same to rounding where the weights are, and close to it after some steps of AdamW."""
    a, b = metrics(one), metrics(other)
    for key in ("step", "tokens", "supervised", "lr"):
        assert [row[key] for row in a] == [row[key] for row in b]
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-6)
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], rel=1e-5)
    own, found = weights(one), weights(other)
    assert own.keys() == found.keys()
    for name, tensor in own.items():
        # What all keys share changes no softmax: its gradient is rounding, which AdamW enlarges.
        if not name.endswith("k_proj.bias"):
            assert apart(tensor, found[name]) < 1e-3, name


def parts_moved(out: Path) -> dict[str, bool]:
    (file,) = out.glob("*/training.json")
    return {name: part["moved"] for name, part in json.loads(file.read_text())["parts"].items()}


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_as_one(name: str, root: Path) -> None:
    one, two = root / "ranks-1" / name, root / "ranks-2" / name
    assert_same_run(one, two)
    pairs = list(zip(gradients(one), gradients(two), strict=True))
    assert apart(*pairs[0]) < 1e-6
    assert max(apart(*pair) for pair in pairs) < 1e-4
    assert parts_moved(one) == parts_moved(two)
    assert {f.name for f in (one / "align").glob("*")} == {
        f.name for f in (two / "align").glob("*")
    }


@pytest.mark.parametrize("name", ["align", "vision", "gated"])
def test_two_processes_look_at_the_held_out_rows_as_one(name: str, root: Path) -> None:
    """An odd number of rows and questions, with and without pictures."""
    one, two = (
        [row["validation"] for row in metrics(root / ranks / name) if "validation" in row]
        for ranks in ("ranks-1", "ranks-2")
    )
    assert len(one) == len(two) == 2
    assert all(len(found["probe"]) == 3 and found["rows"] % 2 for found in one)
    for a, b in zip(one, two, strict=True):
        assert a["rows"] == b["rows"] and a["probe"] == b["probe"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_only_the_main_process_reads_the_weights(root: Path) -> None:
    for name in ALIKE:
        held = [int((root / "ranks-2" / name / f"held.{rank}").read_text()) for rank in (0, 1)]
        assert held[0] == int((root / "ranks-1" / name / "held.0").read_text()) > 0 == held[1]


def test_a_step_is_the_same_however_many_compute_it_in_pieces(root: Path) -> None:
    whole = root / "ranks-1/1x4"
    for pieces in ("ranks-1/2x2", "ranks-1/4x1", "ranks-2/2x2", "ranks-2/4x1"):
        assert_same_run(whole, root / pieces)
        assert apart(gradients(whole)[0], gradients(root / pieces)[0]) < 1e-6


def test_some_steps_show_images_to_one_process_only(root: Path, jobs: dict[str, Job]) -> None:
    spec = jobs["align"].spec
    processor = stage_processor(spec)
    loaders = [build_loader(spec, processor, Processes(rank, 2)) for rank in (0, 1)]
    seen = {
        tuple(len(loader.micro_batches_at(step)[0].pixel_values) > 0 for loader in loaders)
        for step in range(4)
    }
    assert seen >= {(True, False), (False, False)} or seen >= {(False, True), (False, False)}


def test_only_the_declared_parts_move(root: Path) -> None:
    trained = {
        "align": {"connector"},
        "vision": {"vision", "connector", "language"},
        "gated": {"connector"},
        "lora": {"connector", "adapters"},
    }
    for name, moved in trained.items():
        found = parts_moved(root / "ranks-2" / name)
        assert {part for part, did in found.items() if did} == moved


def test_two_go_on_where_one_stopped_from_the_last_sound_state(root: Path) -> None:
    out = root / "ranks-2/halved"
    assert_same_run(root / "ranks-1/2x2", out)
    record = json.loads((out / "tune/training.json").read_text())
    assert record["result"]["resumed_from"] == 2
    assert not (out / "tune.states").exists()


def test_one_goes_on_where_two_stopped(root: Path, jobs: dict[str, Job]) -> None:
    out = root / "ranks-2/stopped"
    # The signal reached one of them; both saved and stopped.
    ends = [(out / f"end.{rank}").read_text() for rank in (0, 1)]
    assert ends[0].startswith("SystemExit: stopped after step 3") and ends[1] == "SystemExit: 1"
    states = sorted(path.name for path in (out / "tune.states").iterdir())
    assert states == ["step_00000002", "step_00000003"]
    run_job(Job(jobs["stopped"].spec), out)
    assert_same_run(root / "ranks-1/2x2", out)
    record = json.loads((out / "tune/training.json").read_text())
    assert record["result"]["resumed_from"] == 3


def test_a_process_that_is_stuck_names_its_samples_and_all_end(
    root: Path, jobs: dict[str, Job]
) -> None:
    """It sleeps in its fourth step while the other one waits for it."""
    out, spec = root / "ranks-2/stuck", jobs["stuck"].spec
    record = json.loads((out / "tune.stuck.rank-1.json").read_text())
    assert (record["step"], record["stage"]) == (4, "tune")
    loader = build_loader(spec, Processor.load(spec.init), Processes(1, 2))
    own = [name for batch in loader.micro_batches_at(3) for name in batch.sample_ids]
    assert record["samples"] == own and len(own) == 2
    said = (root / "stuck.log").read_text()
    assert "stage 'tune' is stuck: process 1 has been computing" in said and own[0] in said
    # Where it was is shown, with its line.
    assert "training_jobs.py" in said.split("is stuck")[1]
    # The other one was ended by its own watchdog, or has noticed that this one is gone.
    end = out / "end.0"
    assert (out / "tune.stuck.rank-0.json").is_file() or "another one has ended" in end.read_text()
    run_job(Job(spec), out)
    assert_same_run(root / "ranks-1/2x2", out)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(root: Path) -> None:
    out = root / "ranks-2/broken"
    for rank in (0, 1):
        said = (out / f"end.{rank}").read_text()
        assert said.startswith("PumiceError: stage 'tune' stopped at step 2: loss nan")
    assert len(set(json.loads((out / "tune.not_finite.json").read_text())["samples"])) == 4
