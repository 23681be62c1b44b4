"""The recipes of the papers hold their numbers, and each stage prepares images in its own way."""

from __future__ import annotations

from pathlib import Path

import pytest

from pumice.cli.stages import stage_specs
from pumice.core import shipped
from pumice.core.errors import PumiceError
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor
from pumice.recipe.load import load_recipe
from pumice.train import build
from tokenizers_zoo import tokenizer

CLIP = "openai/clip-vit-large-patch14"
# Vision, connector, language, image, learning rate and batch of stage 1, epochs of stage 2.
TABLE = {
    "llava": (CLIP, "linear", "lmsys/vicuna-7b-v1.3", "crop", 2e-3, 128, 3.0),
    "llava15-7b": (f"{CLIP}-336", "mlp2x_gelu", "lmsys/vicuna-7b-v1.5", "pad", 1e-3, 256, 1.0),
    "llava15-13b": (f"{CLIP}-336", "mlp2x_gelu", "lmsys/vicuna-13b-v1.5", "pad", 1e-3, 256, 1.0),
}
SCORES = {
    "llava": {"MM-Vet": 25.5, "MME": 809.6},
    "llava15-7b": {"GQA": 62.0, "MM-Vet": 31.1, "MME": 1510.7, "SEED": 58.6},
    "llava15-13b": {"GQA": 63.3, "MM-Vet": 36.1, "MME": 1531.3, "SEED": 61.6},
}


@pytest.mark.parametrize("name", TABLE)
def test_the_settings_of_the_scripts(name: str) -> None:
    recipe = load_recipe(name)
    vision, connector, language, image, rate, batch, epochs = TABLE[name]
    model, align, tune = recipe.model, recipe.stages.align, recipe.stages.tune
    assert (model.vision, model.connector, model.language) == (vision, connector, language)
    assert (model.image, model.vision_layer, model.vision_select) == (image, -2, "patch")
    assert (model.template, model.system) == ("vicuna_v1", None)
    assert align is not None and tune is not None
    assert align.train == {"connector": rate} and align.template == "plain"
    assert (align.image or model.image) == "crop" and (tune.image or model.image) == image
    assert tune.train == {"connector": 2e-5, "language": 2e-5} and tune.template is None
    assert (align.batch_size, tune.batch_size) == (batch, 128)
    assert (align.epochs, tune.epochs) == (1.0, epochs)
    for stage in (align, tune):
        assert (stage.warmup, stage.schedule, stage.weight_decay) == (0.03, "cosine", 0.0)
        assert (stage.clip, stage.max_tokens, stage.lora, stage.steps) == (None, 2048, None, None)
    assert tune.group_by_length == tune.group_by_modality == name.startswith("llava15")


@pytest.mark.parametrize("name", TABLE)
def test_what_the_source_reports(name: str) -> None:
    recipe = load_recipe(name)
    published = recipe.published
    assert published is not None and "arXiv" in recipe.source
    assert "A100" in published.hardware and set(published.hours) == {"align", "tune"}
    assert SCORES[name].items() <= published.scores.items()


def test_each_stage_prepares_images_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "resolve_backbone", Path)
    specs = stage_specs(load_recipe("llava15-7b"), tmp_path, tmp_path)
    assert [spec.image_mode for spec in specs] == ["crop", "pad"]
    aligned = Processor(tokenizer("llama"), ImageSpec("crop", 336), "plain", None, 576)
    aligned.save(tmp_path / "align")
    tuned = build.build_processor(specs[1], None)  # type: ignore[arg-type]
    assert tuned.image_spec == ImageSpec("pad", 336) and tuned.template.name == "vicuna_v1"


def test_a_model_that_tiles_does_so_in_every_stage() -> None:
    changes = ["model.image=hd", "stages.align.image=crop"]
    with pytest.raises(PumiceError, match=r"stages.align.image is 'crop', but model.image is 'hd'"):
        load_recipe("pocket", changes)
