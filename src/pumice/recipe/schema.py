"""What a recipe may say: every design choice of a run, typed and checked, nothing else.

The recipe files in `recipes/` follow this schema; `recipe.load` reads them. An unknown key is an
error, so a misspelt choice can never be ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Part = Literal["vision", "connector", "language"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of a recipe: exact types, no unknown keys, not changed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelChoice(Section):
    """The architecture: which backbones, which connector, how an image and a turn are written."""

    vision: str | list[str]
    """One backbone, or two whose features are fused."""
    vision_layer: int = -2
    vision_select: Literal["patch", "cls_patch"] = "patch"
    vision_norm: bool = False
    connector: str = "mlp2x_gelu"
    connector_options: dict[str, bool | int | float | str] = {}
    connector_from: str | None = None
    """Released weights to start the connector from: a folder, a file, or a name of the Hub."""
    language: str
    image: Literal["pad", "crop", "resize", "hd", "next"] = "pad"
    tiling: dict[str, Any] = {}
    """Settings of `hd` and `next` (docs/hd.md); the tile is as large as the backbone's picture."""
    template: str = "vicuna_v1"
    system: str | None = None

    @model_validator(mode="after")
    def _tiling_of_tiled_images(self) -> Self:
        if self.tiling and self.image not in ("hd", "next"):
            raise ValueError(f"tiling is set, but image is {self.image!r}: use image hd or next")
        return self


class World(Section):
    """The synthetic world to make when its files are missing."""

    images: PositiveInt
    eval_images: PositiveInt = 500
    seed: int = 0
    wide: bool = False
    """Pictures twice as wide and high, with things of the same pixels (for tiles)."""
    sources: bool = False
    """Training files also for each source of LLaVA-1.5's mixture (for studies of data)."""
    variants: bool = False
    """Training files also that say less of the pictures, and of single skills (for studies)."""
    resolution: PositiveInt | None = None
    """Pictures with no more detail than so many pixels a side hold; null for all they have."""


class DataFile(Section):
    """One source of training rows (docs/sources.md), their images, their share of the mixture."""

    path: str
    """A file, a directory, or a pattern such as shards/{000..127}.tar."""
    images: str | None = None
    """The directory of the images that rows name; null for where the path lies."""
    weight: PositiveFloat = 1.0
    cap: PositiveInt | None = None
    kind: Literal["dataset", "parquet", "tar", "folder", "json"] | None = None
    """Null lets the content decide."""
    question: str | None = None
    """What captions without a conversation answer."""


class Lora(Section):
    """Adapters that learn in place of the language model's weights, at `train.language`'s rate."""

    r: PositiveInt = 128
    alpha: PositiveFloat = 256.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: list[str] | None = Field(default=None, min_length=1)
    """Last names of the layers, such as q_proj; null for every linear layer but the output head."""
    rslora: bool = False
    quantize: Literal["int8", "int4"] | None = None
    """Holds the frozen base in 8 or 4 bits; it can then not be merged into, only saved beside."""
    save: Literal["merged", "adapter"] = "merged"
    """A whole model; or the adapter alone, which needs its base to be opened."""

    @model_validator(mode="after")
    def _merged_into_full_precision(self) -> Self:
        if self.quantize is not None and self.save == "merged":
            raise ValueError(
                f"quantize is {self.quantize} and save is merged, but adapters are merged into "
                "full precision only: set save to adapter"
            )
        return self


class Packing(Section):
    """Conversations of a step in as few rows as the budget of a row allows, without padding."""

    tokens: PositiveInt
    tiles: PositiveInt | None = None
    """Views of images a row may hold (one an image, more where it is tiled); null for any."""


class Validation(Section):
    """Rows held out by the content of their images, and how often they are looked at."""

    fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    every: PositiveInt = 200
    """Steps from one look to the next; the last step has one in any case."""
    rows: PositiveInt = 128
    """So many of the held-out rows at most."""
    probes: Annotated[int, Field(ge=0)] = 3
    """Held-out questions whose generated answers stand in metrics.jsonl and report.html."""


class Stage(Section):
    """One training stage. A part not named in `train`, or named with null, is frozen."""

    template: str | None = None
    system: str | None = None
    image: Literal["pad", "crop", "resize"] | None = None
    """How this stage prepares images, when otherwise than the model."""
    train: dict[Part, PositiveFloat] = Field(min_length=1)
    lora: Lora | None = None
    data: list[DataFile] = Field(min_length=1)
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    batch_size: PositiveInt
    warmup: Fraction = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clip: PositiveFloat | None = 1.0
    max_tokens: PositiveInt = 2048
    group_by_length: bool = False
    group_by_modality: bool = False
    """Batches of conversations with images, and batches of text alone, as LLaVA-1.5 does."""
    packing: Packing | None = None
    micro_batch_size: PositiveInt | None = None
    """So many conversations of a step are computed at a time; null for all of them."""
    save_every: PositiveInt = 500
    """Steps from one saved state to the next: so many are lost at most when a run is killed."""
    watchdog_minutes: PositiveFloat | None = 30.0
    """A step that takes longer ends the run and names its samples; null waits for ever."""
    spike: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A loss of more than so many times the mean of the 50 steps before ends the run and names its
    samples; null goes on whatever it is."""
    checkpointing: Annotated[str, Field(pattern=r"^(none|blocks|every_[1-9]\d*)$")] = "none"
    """Blocks that are computed again in the backward pass, to save memory: `blocks` for each,
    `every_2` for every second one, ..."""
    validation: Validation | None = None
    compile: bool = False
    """The language model's blocks through torch.compile; needs a compiler."""

    @field_validator("train", mode="before")
    @classmethod
    def _null_freezes(cls, train: Any) -> Any:
        if not isinstance(train, dict):
            return train
        # A misspelt part stays, to be refused.
        parts = get_args(Part)
        return {key: rate for key, rate in train.items() if rate is not None or key not in parts}

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            given = f"steps={self.steps} and epochs={self.epochs}"
            raise ValueError(f"{given}: set exactly one of the two, and the other to null")
        return self

    @model_validator(mode="after")
    def _adapters_have_a_rate(self) -> Self:
        if self.lora is not None and "language" not in self.train:
            raise ValueError(
                f"lora is set but train names {', '.join(self.train)}: adapters learn at "
                "train.language's rate; set it, or set lora to null"
            )
        return self

    @model_validator(mode="after")
    def _pieces_of_a_step(self) -> Self:
        if self.packing is not None and self.micro_batch_size is not None:
            raise ValueError(
                "packing and micro_batch_size are both set, and each says in which pieces a step "
                "is computed: set one of them to null"
            )
        if self.packing is not None and self.packing.tokens < self.max_tokens:
            raise ValueError(
                f"packing.tokens is {self.packing.tokens} and max_tokens is {self.max_tokens}: a "
                "packed row must hold the longest conversation; raise one or lower the other"
            )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size} and batch_size {self.batch_size}: "
                "a divisor of batch_size is allowed"
            )
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
    options: dict[str, dict[str, str]] = {}
    """By benchmark, the official versions that differ from the default (docs/benchmarks.md)."""
    data: str | None = None
    limit: PositiveInt | None = None
    batch_size: PositiveInt = 32

    @field_validator("options", mode="before")
    @classmethod
    def _versions_are_texts(cls, options: Any) -> Any:
        """`scorer: 2021` is a number in YAML, and the name of a version here."""
        if not isinstance(options, dict):
            return options
        return {
            bench: {
                name: str(value) if type(value) is int else value for name, value in chosen.items()
            }
            if isinstance(chosen, dict)
            else chosen
            for bench, chosen in options.items()
        }

    def option_list(self) -> list[str]:
        """The options as a command line gives them: BENCH.NAME=VALUE."""
        return [
            f"{bench}.{name}={value}"
            for bench, chosen in self.options.items()
            for name, value in chosen.items()
        ]


class Published(Section):
    """What the source of a recipe reports about it, to compare with; no run depends on it."""

    hardware: str = ""
    hours: dict[Literal["align", "tune"], PositiveFloat] = {}
    rows: dict[Literal["align", "tune"], PositiveInt] = {}
    """Of the data of each stage."""
    scores: dict[str, float]
    note: str = ""


class Recipe(Section):
    """A whole run: what is built, from which data, trained how, judged by what."""

    name: str
    about: str = ""
    source: str = ""
    published: Published | None = None
    seed: int = 0
    model: ModelChoice
    world: World | None = None
    data: str | None = None
    stages: Stages
    eval: Evaluation | None = None

    @model_validator(mode="after")
    def _stages_of_tiled_images(self) -> Self:
        for name, stage in self.stage_list():
            if stage.image is not None and self.model.image in ("hd", "next"):
                raise ValueError(
                    f"stages.{name}.image is {stage.image!r}, but model.image is "
                    f"{self.model.image!r}: a model that tiles does so in every stage"
                )
        return self

    def stage_list(self) -> list[tuple[str, Stage]]:
        """The stages this recipe has, in running order."""
        pairs = (("align", self.stages.align), ("tune", self.stages.tune))
        return [(name, stage) for name, stage in pairs if stage is not None]
