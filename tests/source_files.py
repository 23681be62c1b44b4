"""The same twelve rows with their pictures in every kind of source."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

import tiny
from pumice.core.types import ImagePart, Sample

COUNT = 12


def rows(count: int = COUNT) -> list[dict[str, Any]]:
    """One image, two images, none, in turn."""
    found = []
    for number in range(count):
        names = [[f"{number}a.png"], [f"{number}a.png", f"{number}b.png"], []][number % 3]
        asked = " and ".join(["<image>"] * len(names)) + f"\nWhich, {number}?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"Answer {number}."}]
        found.append({"id": f"row{number}", "image": names, "conversations": turns})
    return found


def picture(name: str) -> bytes:
    buffer = io.BytesIO()
    tiny.noise(sum(name.encode()), (9, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_json(folder: Path) -> Path:
    for row in rows():
        for name in row["image"]:
            (folder / name).write_bytes(picture(name))
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    return folder / "rows.jsonl"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, per_shard: int = 5, long: str = "") -> Path:
    """Shards of `per_shard` rows; members of a sample are <key>.json, <key>.0.png, <key>.1.png."""
    everything = rows()
    for shard in range(-(-len(everything) // per_shard)):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for row in everything[shard * per_shard : (shard + 1) * per_shard]:
                for place, name in enumerate(row["image"]):
                    add(tar, f"{long}{row['id']}.{place}.png", picture(name))
                held = {key: row[key] for key in ("id", "conversations")}
                add(tar, f"{long}{row['id']}.json", json.dumps(held).encode())
    return folder


def with_bytes() -> list[dict[str, Any]]:
    return [
        {**row, "image": [{"bytes": picture(n), "path": n} for n in row["image"]]} for row in rows()
    ]


def write_parquet(folder: Path) -> Path:
    table = pa.Table.from_pylist(with_bytes()).append_column("other", pa.array(range(COUNT)))
    pq.write_table(table.slice(0, 7), folder / "a.parquet", row_group_size=2)
    pq.write_table(table.slice(7), folder / "b.parquet", row_group_size=3)
    return folder


def write_dataset(folder: Path) -> Path:
    data = datasets.Dataset.from_list(with_bytes())
    data = data.cast_column("image", datasets.List(datasets.Image()))
    data.save_to_disk(folder / "saved")
    return folder / "saved"


def bytes_of(sample: Sample) -> list[Any]:
    """Roles, texts and image bytes, wherever the images came from."""
    return [
        (message.role, [_seen(part) for part in message.content]) for message in sample.messages
    ]


def _seen(part: Any) -> Any:
    if not isinstance(part, ImagePart):
        return part.text
    return part.image.read_bytes() if isinstance(part.image, Path) else part.image


WRITERS: dict[str, Callable[[Path], Path]] = {
    "json": write_json,
    "tar": write_shards,
    "parquet": write_parquet,
    "dataset": write_dataset,
}
