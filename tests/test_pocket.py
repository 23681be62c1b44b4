"""The main road as a user walks it: the shipped model answers, and the quick recipe learns."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import pumice
from pumice.cli.app import app
from pumice.core.shipped import SHIPPED_DIR
from pumice.models.checkpoint import load_lmm
from pumice.train.metrics import part_hash
from pumice.world.datasets import make_world
from pumice.world.scenes import random_scene, render

pytestmark = pytest.mark.slow


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world neither the shipped model nor the quick run has seen."""
    folder = tmp_path_factory.mktemp("unseen")
    make_world(folder, images=1, eval_images=80, seed=7)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick") / "run"
    invoke("run", "pocket-quick", "--out", folder)
    return folder


def test_everything_shipped_fits_in_sixteen_megabytes() -> None:
    total = sum(path.stat().st_size for path in SHIPPED_DIR.rglob("*") if path.is_file())
    assert 0 < total <= 16 * 2**20


def test_the_shipped_model_sees(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    invoke("eval", "pocket", "--bench", "pope,vqav2", "--data", world, "--out", out)
    scores = {
        name: json.loads((out / name / "scores.json").read_text()) for name in ("pope", "vqav2")
    }
    assert scores["vqav2"]["metrics"]["accuracy"] > scores["vqav2"]["base_rate"]["accuracy"] + 40
    assert scores["vqav2"]["metrics"]["accuracy"] >= 90
    assert scores["vqav2"]["metrics"]["answer_words"] <= 2
    assert scores["pope"]["metrics"]["mean_f1"] >= 90
    assert 45 <= scores["pope"]["metrics"]["yes_ratio"] <= 55


def test_ask_answers_as_the_command_line_promises(tmp_path: Path) -> None:
    scene = next(
        scene for scene in map(random_scene, range(9_000_000, 9_000_999))
        if any(thing.shape == "cross" for thing in scene.shapes)
    )  # fmt: skip
    cross = next(thing for thing in scene.shapes if thing.shape == "cross")
    render(scene).save(tmp_path / "scene.png")
    picture = tmp_path / "scene.png"
    result = invoke("ask", "pocket", "What colour is the cross?", "--image", picture, "--json")
    answer = json.loads(result.stdout)
    assert set(answer) == {"text", "finish_reason", "prompt_tokens", "image_tokens", "new_tokens"}
    assert cross.color in answer["text"].lower()
    assert answer["image_tokens"] == 36 and answer["finish_reason"] == "stop"
    short = "What colour is the cross?\nAnswer the question using a single word or phrase."
    assert pumice.load("pocket").ask(short, images=[picture]).text == cross.color


def test_the_quick_recipe_learns_to_see(quick: Path) -> None:
    scores = json.loads((quick / "scores.json").read_text())["benchmarks"]
    vqa = scores["vqav2"]
    assert vqa["metrics"]["accuracy"] > 80
    assert vqa["metrics"]["accuracy"] > vqa["base_rate"]["accuracy"] + 30
    # With another image the same model knows no more than someone who does not look.
    assert abs(vqa["shuffled"]["metrics"]["accuracy"] - vqa["base_rate"]["accuracy"]) < 15


def test_a_run_leaves_what_it_promises(quick: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "scores.json", "report.html"):
        assert (quick / name).is_file(), name
    report = (quick / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "") and "<script src" not in report
    assert report.count("data:image/") >= 12
    rows = [json.loads(line) for line in (quick / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "align"] == list(range(1, 151))
    assert [row["step"] for row in rows if row["stage"] == "tune"] == list(range(1, 251))


def test_the_vision_backbone_of_the_run_is_the_shipped_one(quick: Path) -> None:
    trained = [part_hash(load_lmm(quick / stage).vision) for stage in ("align", "tune")]
    record = json.loads((quick / "align" / "training.json").read_text())["parts"]["vision"]
    assert set(trained) == {record["before"]} and not record["moved"]


def test_generate_writes_one_row_for_every_row(quick: Path, world: Path, tmp_path: Path) -> None:
    image = "COCO_val2014_000000000001.jpg"
    rows = [
        {"question_id": 1, "image": image, "text": "What color is the background?"},
        {"question_id": 2, "image": "missing.jpg", "text": "What color is the background?"},
        {"id": "chat", "messages": [{"role": "user", "content": "Hello, who are you?"}]},
    ]
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = world / "val2014"
    arguments = ("--requests", requests, "--images", images, "--out", answers)
    invoke("generate", quick / "tune", *arguments)
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(found) == 3
    assert "background" in found[0]["text"] and "error" in found[1] and found[2]["text"]
    assert "missing.jpg" in found[1]["error"]
