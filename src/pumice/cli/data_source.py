"""What the commands of `pumice data` share: which rows are read, and with whose eyes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.processing.processor import Processor

FileArg = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="JSON, JSONL, parquet, tar shards, a saved dataset or an image folder."
    ),
]
ImagesDirOption = Annotated[
    Path | None,
    typer.Option(
        "--images", metavar="DIR", help="Directory of the images; beside FILE if left out."
    ),
]
KindOption = Annotated[
    str | None, typer.Option("--kind", help="json, parquet, tar, dataset or folder; else guessed.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Read with this checkpoint's processor.")
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="Read as this recipe's stage does.")
]
StageOption = Annotated[
    str | None, typer.Option("--stage", help="A stage of the recipe; its last if left out.")
]


def check_images(images: Path | None) -> None:
    """Before any row is read: a missing directory would make every row a bad one."""
    if images is not None and not images.is_dir():
        raise PumiceError(
            f"--images {images} is no directory; the one below which rows name their images is "
            f"needed. Check it."
        )


def check_out(out: Path, *endings: str) -> None:
    """Before anything is made: `out` can be a file, and its ending says what is in it."""
    if out.is_dir():
        raise PumiceError(f"--out {out} is a directory; give the name of a file.")
    if endings and out.suffix not in endings:
        raise PumiceError(
            f"--out {out} ends in {out.suffix or 'nothing'!r}; allowed: {', '.join(endings)}, "
            f"which say how rows are written. Give another name."
        )


@dataclass(frozen=True, slots=True)
class Reader:
    """Whose processor reads the rows, and how many tokens a conversation may have."""

    name: str
    processor: Processor
    max_tokens: int


def reader_of(model: str | None, recipe: str | None, stage: str | None) -> Reader | None:
    """The reader that --model or --recipe names; None without either."""
    if model is not None and recipe is not None:
        raise PumiceError(
            f"--model {model} and --recipe {recipe} both say how rows are read; one is allowed. "
            f"Leave one out."
        )
    if model is not None:
        return _model_reader(model)
    if recipe is not None:
        return _recipe_reader(recipe, stage)
    if stage is not None:
        raise PumiceError(f"--stage {stage} is a stage of a recipe, and none is given. Add one.")
    return None


def _model_reader(model: str) -> Reader:
    from pumice.convert.open import open_parts
    from pumice.core.shipped import resolve_model

    opened = open_parts(resolve_model(model))
    limit = opened.config.language.get("max_position_embeddings")
    return Reader(model, opened.processor, int(limit or 2048))


def _recipe_reader(name: str, stage: str | None) -> Reader:
    from pumice.cli.stages import first_stage_spec
    from pumice.recipe.load import load_recipe
    from pumice.train.build import stage_processor

    recipe = load_recipe(name)
    names = [entry for entry, _ in recipe.stage_list()]
    if stage is not None and stage not in names:
        raise PumiceError(
            f"recipe {recipe.name!r} has no stage {stage!r}; it has: {', '.join(names)}."
        )
    spec = first_stage_spec(recipe, stage or names[-1])
    return Reader(f"{name}, {spec.name}", stage_processor(spec), spec.max_tokens)
