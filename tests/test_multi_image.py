"""The world's rows with several images: the answers are true of the pictures, places are kept."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pumice.core.shipped import resolve_model
from pumice.core.types import ImagePart
from pumice.data.sources import LlavaJson
from pumice.models.constants import IMAGE_ID
from pumice.processing.processor import Processor
from pumice.world.datasets import make_world, train_name
from pumice.world.multi_image import multi_image_rows
from pumice.world.scenes import Scene, random_scene

IMAGES = 300
_NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [random_scene(seed) for seed in range(IMAGES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frames")


@pytest.fixture(scope="module")
def rows(scenes: list[Scene], folder: Path) -> list[dict[str, Any]]:
    return [
        row
        for seed in range(6)
        for row in multi_image_rows(scenes, train_name, folder / str(seed), seed)
        for row["folder"] in [folder / str(seed)]
    ]


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in row["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def truth(question: str, pair: list[Scene]) -> str | None:
    """The answer, found again from the scenes; None for what has many right answers."""
    counts = [len(scene.shapes) for scene in pair]
    if "more shapes" in question:
        return _NAMES[counts.index(max(counts))]
    if found := re.search(r"In which of the two images is there an? (\w+)\?", question):
        inside = [found[1] in {t.shape for t in scene.shapes} for scene in pair]
        assert sum(inside) == 1
        return _NAMES[inside.index(True)]
    if "same background" in question:
        return "yes" if pair[0].background == pair[1].background else "no"
    if found := re.search(r"What color is the (\w+) (?:of|in) the (\w+) image", question):
        scene = pair[_NAMES.index(found[2])]
        if found[1] == "background":
            return scene.background
        return next(thing.color for thing in scene.shapes if thing.shape == found[1])
    assert "What do you see?" in question
    return None


def test_what_is_said_of_two_scenes_is_true(
    rows: list[dict[str, Any]], scenes: list[Scene]
) -> None:
    answers: Counter[str] = Counter()
    for row in rows:
        if not row["id"].startswith("pair"):
            continue
        pair = [scenes[int(Path(name).stem) - 1] for name in row["image"]]
        assert len(pair) == 2 and pair[0] is not pair[1]
        for question, answer in turns(row):
            right = truth(question, pair)
            assert right in (None, answer), (question, pair)
            answers[answer] += 1
    assert 0.6 < answers["first"] / answers["second"] < 1.6
    assert 0.5 < answers["yes"] / answers["no"] < 2


def things_seen(path: Path) -> int:
    """Pixels that differ from the background, which stands in every corner or nearly."""
    pixels = np.asarray(Image.open(path)).astype(int)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return int((np.abs(pixels - np.median(edge, axis=0)).sum(2) > 60).sum())


def test_frames_come_in_the_order_that_is_told(rows: list[dict[str, Any]]) -> None:
    orders: Counter[str] = Counter()
    for row in rows:
        if not row["id"].startswith("events"):
            continue
        seen = [things_seen(row["folder"] / name) for name in row["image"]]
        (question, answer), (_, last) = turns(row)
        assert question.count("<image>") == len(seen) == 3
        if "In which order" in question:
            by_time = [int(number) - 1 for number in answer.split(", ")]
            assert sorted(seen) == [seen[k] for k in by_time] and len(set(seen)) == 3
            assert last == f"In image {seen.index(max(seen)) + 1}."
            orders[answer] += 1
        else:
            assert seen == sorted(seen) and answer != last
    assert len(orders) >= 4


def test_every_image_stands_where_its_row_says(tmp_path: Path) -> None:
    make_world(tmp_path, images=40, eval_images=1)
    source = LlavaJson(tmp_path / "llava" / "multi_image.json", tmp_path / "images")
    content = json.loads(source.path.read_text())
    processor = Processor.load(resolve_model("pocket"))
    for number, row in enumerate(content):
        sample = source[number]
        files = [str(part.image.relative_to(tmp_path / "images")) for part in sample.images]
        assert files == row["image"]
        for message, turn in zip(sample.messages, row["conversations"], strict=True):
            marks = ["<image>" if isinstance(p, ImagePart) else p.text for p in message.content]
            assert "".join(marks) == turn["value"]
        encoded = processor.encode(sample)
        assert encoded.input_ids.count(IMAGE_ID) == len(files) * processor.image_tokens
        assert len(encoded.pixel_values) == len(files)
