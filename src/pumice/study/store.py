"""Where the runs of studies lie, by content: what one study has run, another one finds there.

`runs/KEY` holds a run (as `pumice run` leaves it) and `cell.json` once it is finished, or
`failed.json`; `stages` the trained stages that runs share, `worlds` the synthetic data, `features`
the image features, `recipes` what each run was started with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from pumice.core.files import read_json, sha256_bytes, write_atomic, write_json
from pumice.recipe.load import resolved_yaml
from pumice.recipe.schema import Recipe, World

State = Literal["done", "failed", "missing"]
MakeWorld = Callable[[Path, World], None]
_DONE, _FAILED = "cell.json", "failed.json"


@dataclass(frozen=True, slots=True)
class Store:
    """A directory of runs and of what they share."""

    root: Path

    @property
    def stages(self) -> Path:
        """Trained stages by fingerprint."""
        return self.root / "stages"

    @property
    def features(self) -> Path:
        """Image features."""
        return self.root / "features"

    def run(self, key: str) -> Path:
        """The directory of a run."""
        return self.root / "runs" / key

    def log(self, key: str) -> Path:
        """What a run has said."""
        return self.root / "logs" / f"{key}.txt"

    def lock(self, key: str) -> Path:
        """Held while somebody works on a run."""
        return self.root / "locks" / f"{key}.lock"

    def state(self, key: str) -> State:
        """How far a run is."""
        if (self.run(key) / _DONE).is_file():
            return "done"
        return "failed" if (self.run(key) / _FAILED).is_file() else "missing"

    def error(self, key: str) -> str:
        """Why a run failed."""
        return str(read_json(self.run(key) / _FAILED)["error"])

    def finish(self, key: str, seconds: float) -> None:
        """Mark a run as finished."""
        write_json(self.run(key) / _DONE, {"seconds": round(seconds, 1)})
        (self.run(key) / _FAILED).unlink(missing_ok=True)

    def fail(self, key: str, error: str) -> None:
        """Mark a run as failed; it is tried again when the study is run again."""
        write_json(self.run(key) / _FAILED, {"error": error})

    def prepare(self, key: str, recipe: Recipe, make_world: MakeWorld) -> Path:
        """The recipe file of a run; its world is made once for all that have the same."""
        if recipe.world is not None and recipe.data is None:
            chosen = recipe.world.model_dump(exclude_defaults=True)
            name = sha256_bytes(json.dumps(chosen, sort_keys=True).encode())[:16]
            world = self.root / "worlds" / name
            with FileLock(self.lock(f"world-{name}")):
                make_world(world, recipe.world)
            recipe = recipe.model_copy(update={"data": str(world.resolve())})
        path = self.root / "recipes" / f"{key}.yaml"
        write_atomic(path, resolved_yaml(recipe))
        return path
