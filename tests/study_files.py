"""Studies of seconds: tiny backbones, runs in this process, and runs that can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pumice.cli.app import main
from pumice.core.files import write_atomic
from pumice.recipe.yaml_text import dump_yaml
from pumice.study.costs import Cost
from pumice.study.launch import command
from pumice.study.runner import Job

COST = Cost(image_tokens=16, tokens=116, flops={"align": 100, "tune": 200}, parameters=1000)


def study_tree(root: Path, world: Path, **more: Any) -> dict[str, Any]:
    """A study of two connectors and two seeds on the fixtures' backbones and world."""
    return {
        "name": "tiny",
        "base": "pocket-quick",
        "set": {
            "model.vision": str(root / "vision"),
            "model.language": str(root / "language"),
            "data": str(world),
            "world.images": 6,
            "world.eval_images": 6,
            "stages.align.steps": 2,
            "stages.tune.steps": 3,
            "stages.align.batch_size": 2,
            "stages.tune.batch_size": 2,
        },
        "axes": {"connector": {"path": "model.connector", "values": ["mlp2x_gelu", "linear"]}},
        "seeds": [0, 1],
        "evaluations": ["scienceqa"],
        "limit": 4,
        **more,
    }


def write_study(path: Path, tree: dict[str, Any]) -> Path:
    write_atomic(path, dump_yaml(tree))
    return path


class InProcess:
    """Runs jobs here and remembers them; `before` may break one off or give its error."""

    def __init__(self, before: Callable[[Job], str | None] = lambda job: None) -> None:
        self.before = before
        self.keys: list[str] = []

    def __call__(self, job: Job) -> str | None:
        self.keys.append(job.key)
        error = self.before(job)
        if error is not None:
            return error
        with pytest.raises(SystemExit) as caught:
            main(command(job)[3:])
        return f"exit code {caught.value.code}" if caught.value.code else None

    def stop(self) -> None:
        return None
