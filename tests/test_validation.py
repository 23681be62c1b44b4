"""Held-out rows: never trained on, looked at without changing the run, and an alarm that rings."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from pumice.core.errors import PumiceError
from pumice.core.shipped import SHIPPED_DIR
from pumice.data.held_out import split_sources
from pumice.data.packing import Packing
from pumice.data.sources import LlavaJson
from pumice.models.checkpoint import load_lmm
from pumice.models.lmm import LMM
from pumice.processing.collate import collate
from pumice.processing.processor import Processor
from pumice.train.metrics import part_hash
from pumice.train.stages import DataSpec, StageSpec, run_stage
from pumice.train.trainer import Trainer
from pumice.train.validation import ValidationSpec, Validator, gap_of, unused
from pumice.world.datasets import make_world
from stage_specs import align_spec


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, images=24, eval_images=4)
    return folder


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    return tiny.vision_folder(folder / "vision"), tiny.language_folder(folder / "language")


@pytest.fixture
def spec(scenes: Path, backbones: tuple[Path, Path]) -> StageSpec:
    chosen = ValidationSpec(fraction=0.25, every=2, rows=4, probes=1)
    return align_spec(*backbones, scenes, validation=chosen)


def looks(out: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["validation"]) for row in rows if "validation" in row]


def row(number: int, *images: str) -> dict[str, Any]:
    slots = "<image>\n" * len(images)
    turns = [{"from": "human", "value": f"{slots}{number}?"}, {"from": "gpt", "value": "Yes."}]
    shown = {"image": images[0] if len(images) == 1 else list(images)} if images else {}
    return {"id": str(number), "conversations": turns, **shown}


def test_a_picture_is_on_one_side_under_every_name(tmp_path: Path) -> None:
    """Copies, rows that share one of several pictures, and text."""
    for number in range(30):
        tiny.noise(number).save(tmp_path / f"{number}.png")
        shutil.copy(tmp_path / f"{number}.png", tmp_path / f"copy{number}.png")
    rows = [row(n, f"{n}.png") for n in range(30)]
    rows += [row(30 + n, f"copy{n}.png", f"{n + 1}.png") for n in range(0, 30, 3)]
    rows += [row(100 + n) for n in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "more.json").write_text(json.dumps([row(n, f"copy{n}.png") for n in range(30)]))
    sources = [LlavaJson(tmp_path / name, tmp_path) for name in ("rows.json", "more.json")]
    train, held = split_sources(sources, 0.3)
    sides: list[set[bytes]] = []
    for side in (train, held):
        images = {
            Path(str(part.image)).read_bytes()
            for source in side
            for place in range(len(source))
            for part in source[place].images
        }
        sides.append(images)
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert len(train[0]) + len(held[0]) == 60 and len(train[1]) + len(held[1]) == 30
    assert any(not held[0][n].images for n in range(len(held[0])))
    assert train[0].fingerprint() != sources[0].fingerprint()
    # A row is named as in its file.
    place = int(train[0].rows[-1])
    assert train[0].place(len(train[0]) - 1) == sources[0].place(place)
    again = split_sources(sources[::-1], 0.3)
    assert {s.id for s in (again.held[1][n] for n in range(len(again.held[1])))} == {
        held[0][n].id for n in range(len(held[0]))
    }


def test_a_fraction_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps([row(0), row(0)]))
    with pytest.raises(PumiceError, match="validation.fraction 0.5 leaves"):
        split_sources([LlavaJson(tmp_path / "one.json", tmp_path)], 0.5)


def test_looking_changes_nothing_and_a_resumed_run_looks_the_same(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_train import stop_after

    modes: list[bool] = []
    step = Trainer._step

    def stepping(self: Trainer, *args: Any) -> dict[str, Any]:
        modes.append(self.lmm.connector.training and not self.lmm.language.training)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stepping)
        whole = run_stage(spec, tmp_path / "whole").checkpoint
    assert modes == [True] * 6
    assert spec.validation is not None
    rare = dataclasses.replace(spec.validation, every=100)
    other = run_stage(dataclasses.replace(spec, validation=rare), tmp_path / "rare").checkpoint
    assert [step for step, _ in looks(tmp_path / "whole")] == [2, 4, 6]
    assert looks(tmp_path / "rare") == looks(tmp_path / "whole")[-1:]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit):
            run_stage(spec, tmp_path / "stopped")
    resumed = run_stage(spec, tmp_path / "stopped").checkpoint
    assert looks(tmp_path / "stopped") == looks(tmp_path / "whole")
    connectors = {part_hash(load_lmm(made).connector) for made in (whole, other, resumed)}
    assert len(connectors) == 1
    record = json.loads((whole / "training.json").read_text())["validation"]
    assert record["step"] == 6 and len(record["probe"]) == 1 and record["rows"] == 4
    assert record["probe"][0]["wanted"]


def test_a_packed_stage_looks_as_an_unpacked_one_does(
    spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its decoder attends by documents, and is asked in batches and word after word."""
    # In bfloat16 the likeliest of random words would be a matter of rounding.
    monkeypatch.setattr("pumice.train.parallel.mixed_precision_pays", lambda: False)
    spec = dataclasses.replace(spec, steps=1, train={"connector": 1e-7})
    run_stage(spec, tmp_path / "alone")
    run_stage(dataclasses.replace(spec, packing=Packing(2048)), tmp_path / "packed")
    [(_, alone)], [(_, packed)] = looks(tmp_path / "alone"), looks(tmp_path / "packed")
    assert len(alone["probe"][0]["said"]) > 1
    assert packed["probe"] == alone["probe"]
    assert packed["loss"] == pytest.approx(alone["loss"], abs=1e-4)


def test_what_a_gap_is() -> None:
    own, other = [(2.0, 2), (3.0, 1)], [(4.0, 2), (3.5, 1)]
    found = gap_of(own, other)
    assert found["gap"] == pytest.approx(0.75) and found["gap_error"] == pytest.approx(0.25)
    assert found["shuffled_loss"] == pytest.approx(2.5)
    assert not unused(found) and unused({"gap": 0.2, "gap_error": 0.15})
    assert unused({"gap": 0.005, "gap_error": 0.0}) and not unused(gap_of(own[:1], other[:1]))


@torch.no_grad()
def test_a_probe_says_what_a_model_without_a_cache_says(
    scenes: Path, lmm: LMM, processor: Processor
) -> None:
    """Everything read anew for each token, pictures too: after questions with one and without."""
    rows = LlavaJson(scenes / "llava" / "instruct.json", scenes / "images")
    validator = Validator(ValidationSpec(fraction=0.1, every=1), processor, [], 512)
    for sample in (rows[0], rows[1], rows[2]):
        batch = collate([processor.encode_prompt(sample.messages[:1], where="")], 0)
        ids, said = batch.input_ids, list[int]()
        while len(said) < 32:
            token = int(lmm(ids, pixel_values=batch.pixel_values)[0, -1].argmax())
            if token in processor.end_token_ids:
                break
            said.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert validator._asked(lmm, sample)["said"] == processor.decode(said) != ""
    assert rows[0].images and not rows[1].images


def planted(folder: Path, scenes: Path, *, blind: bool) -> DataSpec:
    """What is in the middle of each picture; `blind` gives each the answer of another."""
    rows = json.loads((scenes / "llava" / "pretrain.json").read_text())
    if blind:
        answers = [entry["conversations"][1] for entry in rows]
        for place, entry in enumerate(rows):
            entry["conversations"][1] = answers[(place * 7 + 3) % len(rows)]
    path = folder / f"{'blind' if blind else 'seeing'}.json"
    path.write_text(json.dumps(rows))
    return DataSpec(path=path, images=scenes / "images")


def test_the_alarm_rings_where_answers_do_not_depend_on_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The pocket model sees; captions of other pictures teach it that looking is of no use."""
    make_world(tmp_path / "world", images=160, eval_images=4)
    vision, language = SHIPPED_DIR / "pocket-vision", SHIPPED_DIR / "pocket-language"
    base = align_spec(
        vision, language, tmp_path / "world", steps=8, batch_size=8, init=SHIPPED_DIR / "pocket",
        train={"connector": 1e-3, "language": 1e-3},
        validation=ValidationSpec(fraction=0.2, every=8, rows=28, probes=0),
    )  # fmt: skip
    for blind in (False, True):
        out = tmp_path / f"{blind}"
        data = (planted(tmp_path, tmp_path / "world", blind=blind),)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            run_stage(dataclasses.replace(base, data=data), out)
        ((_, found),) = looks(out)
        assert found["image_not_used"] is blind, found
        assert ("the image is not used" in caplog.text) is blind
