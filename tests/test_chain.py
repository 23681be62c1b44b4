"""docs/data.md's way from pictures to a tuned model, command by command as written there.

On pictures of the world always, and on real photographs where they are at hand: in
`../shared/data/photos` or `$PUMICE_PHOTOS`.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from command_lines import code_blocks
from conftest import Run
from pumice.core.files import read_jsonl
from pumice.data.open_source import open_source
from pumice.world.datasets import make_world
from pumice.world.teacher import Teacher, teaching
from real_files import PHOTOS, lacking

REPOSITORY = Path(__file__).resolve().parents[1]
SECTION = (
    (REPOSITORY / "docs" / "data.md")
    .read_text("utf-8")
    .split("## From photographs to a tuned model")[1]
    .split("\n## ")[0]
)
ENDPOINT = "http://127.0.0.1:8001/v1"
IMAGES = 12


def world_photos(folder: Path) -> int:
    """Twelve pictures of the world and their COCO files."""
    make_world(folder / "world", images=IMAGES, eval_images=1)
    shutil.copytree(folder / "world" / "images" / "train", folder / "photos" / "images")
    for name in ("captions", "instances"):
        file = folder / "world" / "coco" / "annotations" / f"{name}_train2014.json"
        shutil.copy(file, folder / "photos" / f"{name}.json")
    return IMAGES


def real_photos(folder: Path) -> int:
    """All photographs at hand; captions and boxes as COCO lays them out."""
    if not (PHOTOS / "index.json").is_file():
        pytest.skip(lacking(PHOTOS, "photographs with captions"))
    photos = json.loads((PHOTOS / "index.json").read_text("utf-8"))
    shutil.copytree(PHOTOS / "images", folder / "photos" / "images")
    names = sorted({thing["cat"] for photo in photos for thing in photo["objects"] or ()})
    images = [
        {key: photo[key] for key in ("id", "width", "height")} | {"file_name": photo["image"]}
        for photo in photos
    ]
    captions = [(photo["id"], text) for photo in photos for text in photo["captions"]]
    boxes = [
        {
            "id": number,
            "image_id": photo["id"],
            "category_id": names.index(thing["cat"]),
            "iscrowd": thing["crowd"],
            "bbox": [x0 * w, y0 * h, (x1 - x0) * w, (y1 - y0) * h],
        }
        for photo in photos
        for number, thing in enumerate(photo["objects"] or ())
        for (x0, y0, x1, y1), w, h in [(thing["box"], photo["width"], photo["height"])]
    ]
    written: dict[str, dict[str, Any]] = {
        "captions": {
            "annotations": [
                {"id": number, "image_id": image, "caption": text}
                for number, (image, text) in enumerate(captions)
            ]
        },
        "instances": {
            "annotations": boxes,
            "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
        },
    }
    for name, content in written.items():
        (folder / "photos" / f"{name}.json").write_text(json.dumps({"images": images, **content}))
    return len(photos)


def write_others(folder: Path) -> None:
    """Captions beside pictures that lie inside the file; one of them is cut."""
    pictures = sorted((folder / "images").iterdir())[:3]
    held = [picture.read_bytes() for picture in pictures]
    held.append(held[0][: len(held[0]) // 2])
    rows = [
        {"image": {"bytes": data, "path": None}, "caption": f"Picture number {number}."}
        for number, data in enumerate(held)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "others.parquet")


@pytest.mark.parametrize("photos", [world_photos, real_photos], ids=["world", "photographs"])
def test_from_captions_and_boxes_to_a_tuned_model(
    photos: Callable[[Path], int], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    count = photos(tmp_path)
    write_others(Path("photos"))
    for name, text in zip(("mixture", "recipe"), code_blocks(SECTION, "yaml"), strict=True):
        Path(f"photos/{name}.yaml").write_text(text, "utf-8")
    with teaching(Teacher()) as url:
        for line in code_blocks(SECTION, "bash")[0].splitlines():
            code, out, err = run(*shlex.split(line.replace(ENDPOINT, url))[1:])
            assert code == 0, (line, out, err)
    kept = {
        name: [row for _, row in read_jsonl(Path(f"photos/{name}.jsonl"))]
        for name in ("conversation", "detail", "others")
    }
    assert {name: len(rows) for name, rows in kept.items()} == {
        "conversation": count, "detail": count, "others": 3,
    }  # fmt: skip
    record = json.loads(Path("photos/train.jsonl.mix.json").read_text("utf-8"))
    assert record["rows"] == record["with_image"] == 2 * count + 3
    rows = open_source("photos/train.jsonl")
    shown = [part.image for row in range(len(rows)) for part in rows[row].images]
    assert all(isinstance(image, Path) and image.is_file() for image in shown)
    (card,) = json.loads(Path("runs/photos/tune/training.json").read_text("utf-8"))["data"]
    assert card["mixture"]["ids_sha256"] == record["ids_sha256"]
    assert card["verified"]["rows_with_errors"] == 0
    losses = [row["loss"] for _, row in read_jsonl(Path("runs/photos/metrics.jsonl"))]
    assert len(losses) == 8 and all(0 < loss < 20 for loss in losses)
