"""What several files of command line tests share: the command line itself, a model, a world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import AutoTokenizer

import tiny
from pumice.cli.app import main
from pumice.models.checkpoint import save_checkpoint
from pumice.models.lmm import LMM
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor

Run = Callable[..., tuple[int, str, str]]


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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, its backbones, and pictures."""
    root = tmp_path_factory.mktemp("cli")
    tiny.vision_folder(root / "vision")
    tiny.language_folder(root / "language")
    torch.manual_seed(0)
    lmm = LMM.from_backbones(root / "vision", root / "language", "mlp2x_gelu", -2, "patch")
    processor = Processor(
        AutoTokenizer.from_pretrained(root / "language"),
        ImageSpec("pad", tiny.IMAGE_SIZE),
        "vicuna_v1",
        "",
        lmm.image_tokens,
    )
    save_checkpoint(root / "model", lmm, processor.save, {})
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
