"""The data engine with captions and replies that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from pumice.core.errors import DataError
from pumice.data.engine_scenes import read_described
from pumice.world import teacher
from pumice.world.teacher import Teacher, teaching


def generate(
    run: Run, folder: Path, images: int, *more: object
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The outcome, the rows that were kept, and those that were not."""
    captions = folder / "captions.jsonl"
    rows = [{"image": f"{k}.jpg", "captions": [f"A dog by house {k}."]} for k in range(images)]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out.jsonl"
    with teaching(Teacher()) as url:
        code, told, err = run(
            "data", "generate", "reasoning", "--captions", captions, "--endpoint", url,
            "--out", out, "--concurrency", 1, "--json", *more,
        )  # fmt: skip
    assert code in (0, 1), err
    kept, rejected = (
        [json.loads(line) for line in path.open()]
        for path in (out, out.with_name("out.jsonl.rejected.jsonl"))
    )
    return json.loads(told), kept, rejected


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("\ud83d", "malformed: it holds half a character (a lone surrogate)"),
        ("<image>", "malformed: it writes <image>, the place of an image"),
    ],
)
def test_a_reply_that_no_row_can_hold_is_set_aside(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str, reason: str
) -> None:
    says = f"It is the dog of the people in the house {odd} and so it waits there for them to come."
    text = f"Question:\nWhy is it here?\n===\nAnswer:\n{says}"
    monkeypatch.setattr(teacher, "answer", lambda *_: text)
    outcome, kept, rejected = generate(run, tmp_path, 1)
    assert (outcome["kept"], kept) == (0, [])
    assert [(row["reason"], row["text"]) for row in rejected] == [(reason, text)]


@pytest.mark.parametrize("count", [-1_000_000, True, 1.5])
def test_a_usage_that_is_no_count_makes_no_money(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: object
) -> None:
    true = teacher._completion

    def lying(*given: Any) -> dict[str, Any]:
        return true(*given) | {"usage": {"prompt_tokens": count, "completion_tokens": count}}

    monkeypatch.setattr(teacher, "_completion", lying)
    prices = "--price-in", 1000, "--price-out", 1000, "--cost-cap", 10
    outcome, _, _ = generate(run, tmp_path, 20, *prices)
    assert 0 < outcome["cost"] <= 10
    assert outcome["failed"]["cost_cap"] > 10


IMAGES = [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 10}]
CAPTION = {"image_id": 1, "id": 1, "caption": "A dog."}
BOX = {"image_id": 1, "id": 1, "bbox": [0, 0, 1, 1], "category_id": 1}
NAMES = [{"id": 1, "name": "dog"}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"images": IMAGES, "annotations": [CAPTION | {"caption": None}]}, "caption is None"),
        ({"images": IMAGES, "annotations": [CAPTION | {"caption": "\ud83d"}]}, "half a character"),
        (
            {"images": [IMAGES[0] | {"width": 0}], "annotations": [BOX], "categories": NAMES},
            "division by zero",
        ),
        (
            {
                "images": IMAGES,
                "annotations": [BOX | {"bbox": [float("nan"), 0, 1, 1]}],
                "categories": NAMES,
            },
            "^captions:1: the box",
        ),
    ],
)
def test_coco_files_that_are_not_as_they_should_be(
    tmp_path: Path, content: dict[str, Any], told: str
) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=told):
        read_described(path)


def test_rows_that_are_not_as_they_should_be(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row in ({"image": "a.jpg", "captions": [None]}, {"image": 5, "captions": ["A dog."]}):
        path.write_text(json.dumps(row))
        with pytest.raises(DataError, match="line 1: a row needs image, captions"):
            read_described(path)
    path.write_text('{"image": "a.jpg", "captions": ["", " "]}\n{"image": "b", "captions": ["A."]}')
    assert [scene.image for scene in read_described(path)] == ["b"]
