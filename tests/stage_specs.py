"""The stages that several test files train: tiny, over the files of a world."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pumice.train.stages import DataSpec, StageSpec


def align_spec(vision: Path, language: Path, world: Path, **changes: Any) -> StageSpec:
    """A stage that trains a new connector between two backbones, like LLaVA-1.5's first."""
    spec = StageSpec(
        name="align",
        vision=(vision,),
        vision_layer=-2,
        vision_select="patch",
        connector="mlp2x_gelu",
        language=language,
        init=None,
        image_mode="pad",
        template="plain",
        system=None,
        final_template="vicuna_v1",
        final_system="",
        train={"connector": 1e-2},
        data=(data_of(world, "pretrain"),),
        steps=6,
        epochs=None,
        batch_size=4,
    )
    return dataclasses.replace(spec, **changes)


def tune_spec(align: StageSpec, world: Path, init: Path, **changes: Any) -> StageSpec:
    """The stage after `align`, from its checkpoint `init`: the language model learns too."""
    tune: dict[str, Any] = {
        "name": "tune",
        "init": init,
        "template": "vicuna_v1",
        "system": "",
        "train": {"connector": 1e-3, "language": 1e-3},
        "data": (data_of(world, "instruct"),),
    }
    return dataclasses.replace(align, **tune | changes)


def data_of(world: Path, name: str) -> DataSpec:
    return DataSpec(path=world / "llava" / f"{name}.json", images=world / "images")
