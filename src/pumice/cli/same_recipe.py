"""Whether a directory holds a run of this recipe: what may change when a run goes on, what not."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.recipe.schema import Recipe

# The recipe's keys that may change between two runs into one directory: they train nothing.
_FREE_KEYS = {"name", "about", "source", "published", "eval"}
# Where the data and the backbones lie may change; their content is compared by each stage.
_FREE_PLACES = {"data": True, "model": {"vision", "language", "connector_from"}}


def check_same_recipe(recipe: Recipe, out: Path, *, resumes: bool, stage: str | None) -> bool:
    """Whether the run in `out` goes on; where what stays of it has another recipe, an error.

    Stages without a checkpoint or a saved state are trained from their beginning, so their lines
    may be others by now; recipe.yaml then gets them. So do those trained anew (not `resumes`).
    """
    from pumice.recipe.load import load_recipe
    from pumice.recipe.schema import Stages

    path = out / "recipe.yaml"
    if not path.is_file() or (not resumes and stage is None):
        return False
    there = load_recipe(str(path))
    # A stage that is trained anew starts from the ones before it, and those stay.
    stay = takewhile(lambda name: resumes or name != stage, Stages.model_fields)
    kept = [name for name in stay if _has_begun(out, name)]
    if not (resumes or kept):
        return False
    changed = _differences(_compared(there, kept), _compared(recipe, kept))
    if changed:
        raise PumiceError(_refusal(out, changed, kept))
    if there.stages != recipe.stages:
        keep_recipe(there.model_copy(update={"stages": recipe.stages}), out)
    return True


def keep_recipe(recipe: Recipe, out: Path) -> None:
    """Write recipe.yaml beside the results."""
    from pumice.core.files import write_atomic
    from pumice.recipe.load import resolved_yaml

    write_atomic(out / "recipe.yaml", resolved_yaml(recipe))


def _has_begun(out: Path, stage: str) -> bool:
    """Whether there is something of a stage that would be taken as it is, or go on."""
    done = (out / stage / "training.json").is_file()
    return done or any((out / f"{stage}.states").glob("step_*"))


def _compared(recipe: Recipe, kept: list[str]) -> dict[str, Any]:
    """What must be the same: everything that trains something, of the stages those `kept`."""
    from pumice.train.fingerprint import FREE

    stages = dict.fromkeys(dict(recipe.stage_list()), set(FREE))
    free: Any = dict.fromkeys(_FREE_KEYS, True) | _FREE_PLACES | {"stages": stages}
    values = recipe.model_dump(exclude=free)
    values["stages"] = {name: values["stages"].get(name) for name in kept}
    return values


def _refusal(out: Path, changed: list[str], kept: list[str]) -> str:
    words = (
        f"{out} was made with another recipe: {'; '.join(changed[:5])}. Give another --out, or "
        "--resume never to train here again"
    )
    last = kept[-1] if len(kept) > 1 else None
    if last and all(line.startswith(f"stages.{last}.") for line in changed):
        words += f" (with --stage {last}: that stage alone, from the checkpoint of the one before)"
    return f"{words}."


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Dotted keys whose values differ, each with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [
            line
            for key in keys
            for line in _differences(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{place}: {old!r} there, {new!r} now"]
