"""`pumice tiles`: the numbers it says, the picture it draws, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import tiny
from pumice.models.tiling import TilingSpec, plan_image
from pumice.processing.images import ImageSpec
from pumice.processing.tile_drawing import draw_plan

Run = Callable[..., tuple[int, str, str]]

RECIPE = """
name: tiled
model:
  vision: {vision}
  connector: {connector}
  language: pocket-language
  image: {image}
  tiling: {tiling}
data: data
stages:
  align:
    train: {{connector: 1.0e-3}}
    data: [{{path: a.json, images: images}}]
    steps: 1
    batch_size: 1
"""


def recipe(
    folder: Path,
    vision: object = "openai/clip-vit-large-patch14",
    connector: str = "mlp2x_gelu",
    image: str = "hd",
    tiling: str = "{}",
) -> Path:
    path = folder / "recipe.yaml"
    text = RECIPE.format(vision=vision, connector=connector, image=image, tiling=tiling)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1920 x 1080 when held upright; stored turned, as a camera does."""
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (1080, 1920), (200, 30, 30)).save(path, exif=exif)
    return path


def test_the_json_of_a_photograph(photo: Path, run: Run) -> None:
    code, out, err = run("tiles", photo, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "target": [672, 448],
        "grid": [3, 2],
        "tile": 224,
        "tokens": {"global": 256, "tiles": 1344, "row_end": 28, "removed": 192, "total": 1628},
        "scheme": "hd",
        "size": [1920, 1080],
        "resized": [672, 378],
        "offset": [0, 35],
        "views": 7,
        "kept": {"rows": [2, 30], "columns": [0, 48]},
    }


def test_the_text_of_a_photograph(photo: Path, run: Run) -> None:
    code, out, _ = run("tiles", photo)
    assert code == 0
    for said in (
        "1920 x 1080",
        "672 x 448 = 3 x 2 tiles",
        "7: 6 tiles and the global view",
        "1628",
    ):
        assert said in out


def test_the_scheme_and_the_tile_can_be_chosen(photo: Path, run: Run) -> None:
    found = json.loads(run("tiles", photo, "--scheme", "next", "--json")[1])
    assert (found["tile"], found["target"], found["tokens"]["total"]) == (336, [672, 672], 1948)
    found = json.loads(run("tiles", photo, "--tile", "448", "--json")[1])
    assert (found["tile"], found["target"]) == (448, [1344, 896])
    assert found["tokens"]["global"] == 32 * 32


def test_a_recipe_says_how(photo: Path, run: Run, tmp_path: Path) -> None:
    """A published backbone needs no download; a folder is looked into."""
    plain = json.loads(run("tiles", photo, "--json")[1])
    assert json.loads(run("tiles", photo, "--recipe", recipe(tmp_path), "--json")[1]) == plain
    path = recipe(tmp_path, tiling="{max_tiles: 4, global_view: false}")
    found = json.loads(run("tiles", photo, "--recipe", path, "--json")[1])
    assert found["grid"] == [2, 2] and found["tokens"]["global"] == 0
    vision = tiny.vision_folder(tmp_path / "vision")
    found = json.loads(run("tiles", photo, "--recipe", recipe(tmp_path, vision), "--json")[1])
    assert (found["tile"], found["tokens"]["global"]) == (32, 16)
    path = recipe(tmp_path, vision, "resampler", "next")
    found = json.loads(run("tiles", photo, "--recipe", path, "--json")[1])
    assert found["kept"] == {"rows": [0, 2], "columns": [0, 2]}
    assert found["tokens"]["tiles"] == 4 * found["tokens"]["global"]


def test_the_drawing_is_written(photo: Path, run: Run, tmp_path: Path) -> None:
    target = tmp_path / "new" / "tiles.png"
    code, out, err = run("tiles", photo, "--out", target, "--json")
    assert code == 0 and json.loads(out)["views"] == 7
    assert err == f"drawn into {target}\n"
    with PIL.Image.open(target) as drawing:
        assert drawing.format == "PNG" and drawing.mode == "RGB"
        pixels = np.asarray(drawing).astype(int)
    # The red photograph, the orange row ends, one mark for each of 28 rows.
    red = (np.abs(pixels - (200, 30, 30)) <= 4).all(-1)
    assert red.sum() > 100_000
    orange = (pixels == (245, 158, 11)).all(-1)
    marks = orange[:-120, orange[:-120].any(0)].any(1)
    assert (np.diff(marks.astype(int)) == 1).sum() == 28


@pytest.mark.parametrize("size", [(20000, 10), (10, 20000), (1, 1), (300, 200)])
@pytest.mark.parametrize(
    ("spec", "side"),
    [
        (TilingSpec("hd", 224), 16),
        (TilingSpec("hd", 48, global_view=False), None),
        (TilingSpec("next", 336), 24),
    ],
)
def test_every_plan_can_be_drawn(size: tuple[int, int], spec: TilingSpec, side: int | None) -> None:
    image = PIL.Image.new("RGB", size, "white")
    plan = plan_image(size, spec, side, 5 if side is None else side * side)
    drawing = draw_plan(image, plan, ImageSpec("pad", spec.tile))
    assert 900 < drawing.width < 1500 and 200 < drawing.height < 1100


def test_what_cannot_be_shown_is_refused(photo: Path, run: Run, tmp_path: Path) -> None:
    path = recipe(tmp_path)
    for args, said in [
        ((photo, "--recipe", "pocket"), "makes one view of every picture (image: pad)"),
        ((photo, "--recipe", path, "--tile", "336"), "which decides both"),
        ((photo, "--recipe", recipe(tmp_path, tiling="{max_tile: 3}")), "'max_tiles'?"),
        ((tmp_path / "none.jpg",), "none.jpg"),
    ]:
        code, out, err = run("tiles", *args)
        assert (code, out) == (2, "") and said in err and "Traceback" not in err, err
