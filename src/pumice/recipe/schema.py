"""What a recipe may say: every design choice of a run, typed and checked, nothing else.

The recipe files in `recipes/` follow this schema; `recipe.load` reads them. An unknown key is an
error, so a misspelt choice can never be ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Part = Literal["vision", "connector", "language"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of a recipe: exact types, no unknown keys, not changed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelChoice(Section):
    """The architecture: which backbones, which connector, how an image and a turn are written."""

    vision: str
    vision_layer: int = -2
    vision_select: Literal["patch", "cls_patch"] = "patch"
    connector: str = "mlp2x_gelu"
    language: str
    image: Literal["pad", "crop", "resize"] = "pad"
    template: str = "vicuna_v1"
    system: str | None = None


class World(Section):
    """The synthetic world to make when its files are missing."""

    images: PositiveInt
    eval_images: PositiveInt = 500
    seed: int = 0


class DataFile(Section):
    """One training file: conversations, their images, and their share of the mixture."""

    path: str
    images: str
    weight: PositiveFloat = 1.0
    cap: PositiveInt | None = None


class Stage(Section):
    """One training stage. A part not named in `train` is frozen."""

    template: str | None = None
    system: str | None = None
    train: dict[Part, PositiveFloat] = Field(min_length=1)
    data: list[DataFile] = Field(min_length=1)
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    batch_size: PositiveInt
    warmup: Fraction = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: PositiveFloat | None = 1.0
    max_tokens: PositiveInt = 2048
    group_by_length: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            given = f"steps={self.steps} and epochs={self.epochs}"
            raise ValueError(f"{given}: set exactly one of the two, and the other to null")
        return self


class Stages(Section):
    """The stages in the order they run; either may be left out."""

    align: Stage | None = None
    tune: Stage | None = None

    @model_validator(mode="after")
    def _some_stage(self) -> Self:
        if self.align is None and self.tune is None:
            raise ValueError("a recipe needs at least one stage: align, tune or both")
        return self


class Evaluation(Section):
    """The benchmarks a run ends with."""

    benchmarks: list[str] = Field(min_length=1)
    data: str | None = None
    limit: PositiveInt | None = None
    batch_size: PositiveInt = 32


class Recipe(Section):
    """A whole run: what is built, from which data, trained how, judged by what."""

    name: str
    about: str = ""
    source: str = ""
    seed: int = 0
    model: ModelChoice
    world: World | None = None
    data: str | None = None
    stages: Stages
    eval: Evaluation | None = None

    def stage_list(self) -> list[tuple[str, Stage]]:
        """The stages this recipe has, in running order."""
        pairs = (("align", self.stages.align), ("tune", self.stages.tune))
        return [(name, stage) for name, stage in pairs if stage is not None]
