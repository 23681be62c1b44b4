"""The walk of docs/own_data.md on 16 real photographs, block by block as written there.

Runs where the photographs are at hand: in `../shared/data/photos` or `$PUMICE_PHOTOS`.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pumice
from pumice.cli.app import app
from pumice.data.sources import LlavaJson
from pumice.processing.collate import collate
from real_files import PHOTOS, needs

REPOSITORY = Path(__file__).resolve().parents[1]
COUNT = 16

pytestmark = [
    pytest.mark.slow,
    needs(PHOTOS / "index.json", "photographs with captions"),
]


def blocks(language: str) -> list[str]:
    text = (REPOSITORY / "docs" / "own_data.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's first two sections done, and its training command run."""
    folder = tmp_path_factory.mktemp("own")
    photos = json.loads((PHOTOS / "index.json").read_text())[:COUNT]
    (folder / "photos" / "images").mkdir(parents=True)
    (folder / "photos" / "index.json").write_text(json.dumps(photos))
    for photo in photos:
        shutil.copy(PHOTOS / "images" / photo["image"], folder / "photos" / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(blocks("python")[0], "own_data.md", "exec"), {})
        Path("mine.yaml").write_text(blocks("yaml")[0])
        train, _ = blocks("sh")[0].strip().splitlines()
        result = CliRunner().invoke(app, train.split()[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


def test_sixteen_photographs_are_learnt_by_heart(walk: Path) -> None:
    model = pumice.load(walk / "runs" / "mine" / "tune")
    photos = json.loads((walk / "photos" / "index.json").read_text())
    right = [
        model.ask(
            "Describe the image concisely.",
            images=[walk / "photos" / "images" / photo["image"]],
            max_new_tokens=100,
        ).text
        == photo["captions"][0].strip()
        for photo in photos
    ]
    assert sum(right) >= COUNT - 1


def test_with_the_images_shuffled_the_loss_is_clearly_worse(walk: Path) -> None:
    model = pumice.load(walk / "runs" / "mine" / "tune")
    source = LlavaJson(walk / "photos" / "train.json", walk / "photos" / "images")
    batch = collate([model.processor.encode(source[k]) for k in range(COUNT)], 0)
    with torch.no_grad():
        own, count = model.lmm.loss(batch)
        batch.pixel_values = batch.pixel_values.roll(1, dims=0)
        other, _ = model.lmm.loss(batch)
    assert own / count < 0.2
    assert other / count > own / count + 1.0


def test_the_asking_command_of_the_page_answers(
    walk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(walk)
    picture = next((walk / "photos" / "images").iterdir()).name
    arguments = ["ask", "runs/mine/tune", "Describe the image concisely.", "--image"]
    result = CliRunner().invoke(app, [*arguments, f"photos/images/{picture}", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["image_tokens"] == 36
