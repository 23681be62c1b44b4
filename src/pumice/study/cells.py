"""The runs of a study: every arm (a combination of levels) once with every seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.files import sha256_bytes
from pumice.core.hub import is_hub_name
from pumice.core.shipped import resolve_backbone
from pumice.recipe.load import load_recipe
from pumice.recipe.schema import DataFile, Recipe
from pumice.study.costs import Cost, steps_of_budget
from pumice.study.spec import Changes, StudyFile

# What a run is called changes nothing that it computes.
_NAMES = {"name", "about", "source", "published", "data"}
_KEY_LENGTH = 16
CostOf = Callable[[Recipe], Cost]


@dataclass(frozen=True, slots=True)
class Arm:
    """One combination of levels: what stands in a line of a table."""

    levels: tuple[tuple[str, str], ...]
    """Axis and level, in the order of the axes."""
    changes: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The levels, with their axes where there are several."""
        if len(self.levels) == 1:
            return self.levels[0][1]
        return ", ".join(f"{axis} {level}" for axis, level in self.levels)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: an arm with a seed. Equal keys are the same run, whatever study asks for it."""

    arm: Arm
    seed: int
    recipe: Recipe
    key: str
    cost: Cost
    begins: str
    """Equal for runs whose first stage is the same."""


def arms_of(study: StudyFile) -> list[Arm]:
    """Every arm of the grid, the reference among them, in the order of the file."""
    levels = {name: list(axis.levels()) for name, axis in study.axes.items()}
    reference = study.reference_levels()
    if study.grid == "product":
        combinations = [
            dict(zip(levels, chosen, strict=True)) for chosen in product(*levels.values())
        ]
    else:
        combinations = [{**reference, name: level} for name in levels for level in levels[name]]
    unique = {tuple(combination.items()): None for combination in combinations}
    return [Arm(found, tuple(_changes(study, dict(found)).items())) for found in unique]


def _changes(study: StudyFile, levels: Mapping[str, str]) -> Changes:
    changes: Changes = {}
    for axis, level in levels.items():
        changes |= study.axes[axis].levels()[level]
    return changes


def reference_arm(study: StudyFile, arms: Sequence[Arm]) -> Arm:
    """The arm that differences are taken from."""
    wanted = study.reference_levels()
    return next(arm for arm in arms if dict(arm.levels) == wanted)


def cells_of(study: StudyFile, file: Path, cost_of: CostOf) -> list[Cell]:
    """Every run of the study. `cost_of` counts a recipe's tokens and FLOPs.

    With a budget of tokens or FLOPs an arm's steps follow from its cost and the reference's.
    """
    arms = arms_of(study)
    first = study.seeds[0]
    base = study_recipe(study, file, reference_arm(study, arms), first)
    base_cost = cost_of(base)
    cells = []
    for arm in arms:
        plain = study_recipe(study, file, arm, first)
        cost = cost_of(plain)
        steps = steps_of_budget(study.budget, base, base_cost, plain, cost)
        for seed in study.seeds:
            recipe = study_recipe(study, file, arm, seed, steps)
            key, begins = recipe_key(recipe), _beginning(recipe)
            cells.append(Cell(arm, seed, recipe, key, cost, begins))
    return cells


def study_recipe(
    study: StudyFile, file: Path, arm: Arm, seed: int, steps: Mapping[str, int] | None = None
) -> Recipe:
    """The recipe of an arm with a seed, checked as a whole."""
    beside = file.parent / study.base
    base = str(beside) if beside.is_file() else study.base
    changes: Changes = {**study.set, **dict(arm.changes), "seed": seed}
    changes |= {f"stages.{stage}.steps": number for stage, number in (steps or {}).items()}
    if study.evaluations is not None:
        changes["eval.benchmarks"] = study.evaluations
    if study.limit is not None:
        changes["eval.limit"] = study.limit
    texts = [f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in changes.items()]
    try:
        recipe = load_recipe(base, texts)
    except PumiceError as error:
        raise PumiceError(f"study {study.name!r}, {arm.name}: {error}") from error
    if recipe.eval is None:
        raise PumiceError(
            f"study {study.name!r}, {arm.name}: the recipe has no eval section, so there is "
            "nothing to compare. Name benchmarks in `evaluations`."
        )
    return recipe


def in_running_order(cells: Sequence[Cell]) -> list[Cell]:
    """Each run once: those that make a first stage of their own before those that take it over."""
    unique = {cell.key: cell for cell in reversed(cells)}
    leaders = {cell.begins: cell.key for cell in reversed(cells)}
    wanted = [cell for cell in cells if unique[cell.key] is cell]
    return sorted(wanted, key=lambda cell: leaders[cell.begins] != cell.key)


def recipe_key(recipe: Recipe) -> str:
    """A name for what a run computes: its choices, and the content of its data and backbones.

    Backbones that are not on this machine, and data that is not, go by their names.
    """
    # Without defaults, so that a choice which recipes get later renames no run that lacks it.
    content: dict[str, Any] = recipe.model_dump(exclude=_NAMES, exclude_defaults=True)
    root = Path(recipe.data or ".").expanduser()
    if recipe.world is None:
        content["files"] = {
            name: [_data_content(root, entry) for entry in stage.data]
            for name, stage in recipe.stage_list()
        }
    vision = recipe.model.vision
    names = [*([vision] if isinstance(vision, str) else vision), recipe.model.language]
    content["backbones"] = [_backbone_content(name) for name in names]
    if recipe.model.connector.endswith(".py"):
        content["model"]["connector"] = _connector_content(recipe.model.connector)
    return _hash(content)


def _connector_content(name: str) -> str:
    from pumice.models.connectors import named_by_content

    return named_by_content(name)


def _beginning(recipe: Recipe) -> str:
    name, stage = recipe.stage_list()[0]
    parts = recipe.model_dump(include={"model", "world", "data", "seed"})
    return _hash({**parts, name: stage.model_dump()})


def _hash(content: Any) -> str:
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())[:_KEY_LENGTH]


def _data_content(root: Path, entry: DataFile) -> dict[str, Any]:
    path = root / entry.path
    images = None if entry.images is None else root / entry.images
    content = str(path)
    if path.exists():
        state = path.stat()
        content = _fingerprint(path, images, entry, (state.st_size, state.st_mtime_ns))
    return {**entry.model_dump(exclude={"path", "images"}), "content": content}


@cache
def _fingerprint(path: Path, images: Path | None, entry: DataFile, state: tuple[int, int]) -> str:
    """What lies in a source of rows, read once as long as its `state` (size, time) is the same."""
    from pumice.data.open_source import open_source

    return open_source(path, images, kind=entry.kind, question=entry.question).fingerprint()


def _backbone_content(name: str) -> Any:
    from pumice.train.fingerprint import folder_content

    if is_hub_name(name) and not Path(name).expanduser().exists():
        return name
    return folder_content(resolve_backbone(name))
