"""The loss bands that pumice ships: which recorded runs belong to which choices of a recipe.

`loss_bands.json` is made of finished runs by `benchmarks/loss_bands.py`. A band belongs to what a
stage computes, not to a name: a recipe of one's own with the same choices has it, and a shipped one
with another learning rate has none.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.core.files import read_json, sha256_bytes
from pumice.train.fingerprint import FREE

if TYPE_CHECKING:
    from pumice.recipe.schema import Recipe
    from pumice.train.loss_band import LossBand

BANDS = Path(__file__).parent / "loss_bands.json"
# Beside what a stage may change while it goes on: in which pieces a step is computed and when it is
# looked at, not what it is.
_FREE_OF_STAGE = {*FREE, "packing", "micro_batch_size", "compile", "validation"}
_FREE_OF_WORLD = {"eval_images"}


def loss_band(recipe: Recipe, stage: str) -> LossBand | None:
    """Where the loss of this stage lies in healthy runs; None without a record of such runs."""
    from pumice.train.loss_band import LossBand

    wanted = choices(recipe, stage)
    found = next((entry for entry in _known() if entry["choices"] == wanted), None)
    if found is None:
        return None
    return LossBand(
        recipe=found["recipe"],
        seeds=tuple(found["seeds"]),
        window=found["window"],
        low=tuple(found["low"]),
        high=tuple(found["high"]),
    )


def end_of_healthy_runs(recipe: Recipe, stage: str) -> tuple[float, float] | None:
    """Between which losses healthy runs end a stage; None without a record of such runs."""
    band = loss_band(recipe, stage)
    return None if band is None else band.end


def told_end(end: tuple[float, float] | None) -> str:
    """The same in words."""
    return "no record" if end is None else f"{end[0]:.2g} to {end[1]:.2g}"


def choices(recipe: Recipe, stage: str) -> str:
    """A hash of all that decides the loss of a stage, but for the seed.

    The stages before it count too. A default counts as not said: a choice that is new in the schema
    takes no band away. Data of one's own are not known by their names, so that a recipe
    without a world has no band.
    """
    if recipe.world is None:
        return ""
    names = [name for name, _ in recipe.stage_list()]
    stages = dict.fromkeys(names, _FREE_OF_STAGE)
    said: dict[str, Any] = recipe.model_dump(
        include={"model", "world", "stages"},
        exclude={"stages": stages, "world": _FREE_OF_WORLD},
        exclude_defaults=True,
    )
    said["stages"] = {n: said["stages"][n] for n in names[: names.index(stage) + 1]}
    return sha256_bytes(json.dumps(said, sort_keys=True).encode())


@cache
def _known() -> list[dict[str, Any]]:
    known: list[dict[str, Any]] = read_json(BANDS)
    return known
