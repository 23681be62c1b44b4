"""What several test files share: backbones, a model with its engine, the command line, a world."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest

import tiny
from pumice.cli.app import main
from pumice.infer.engine import Engine
from pumice.models.checkpoint import save_checkpoint
from pumice.models.lmm import LMM
from pumice.processing.processor import Processor

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs lies in a directory of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PUMICE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two backbones, `vision` and `language`, that no test changes."""
    root = tmp_path_factory.mktemp("backbones")
    return SimpleNamespace(
        vision=tiny.vision_folder(root / "vision"),
        language=tiny.language_folder(root / "language", tied=False),
    )


@pytest.fixture
def lmm(folders: SimpleNamespace) -> LMM:
    return tiny.new_lmm(folders.vision, folders.language)


@pytest.fixture
def processor(folders: SimpleNamespace, lmm: LMM) -> Processor:
    return tiny.processor_for(lmm, folders.language)


@pytest.fixture
def engine(lmm: LMM, processor: Processor) -> Engine:
    return Engine(lmm, processor)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 0.png, 1.png and 2.png, and broken.png."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        tiny.noise(number).save(root / f"{number}.png")
    (root / "broken.png").write_bytes(b"not a picture")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What command lines read: a tiny checkpoint, its backbones (tied embeddings), and pictures."""
    root = tmp_path_factory.mktemp("cli")
    vision, language = root / "vision", root / "language"
    lmm = tiny.new_lmm(tiny.vision_folder(vision), tiny.language_folder(language))
    save_checkpoint(root / "model", lmm, tiny.processor_for(lmm, language).save, {})
    for number, color in enumerate(("red", "blue")):
        PIL.Image.new("RGB", (40, 24), color).save(root / f"{number}.png")
    (root / "broken.png").write_bytes(b"not a picture")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "data"
    with pytest.raises(SystemExit) as caught:
        main(["world", "make", "--out", str(out), "--images", "6", "--eval-images", "6"])
    assert not caught.value.code
    return out
