"""A training and a generation that are killed come out as if they had not been.

The benchmarks kill_training.py and kill_generate.py do the same with twenty kills.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def found(script: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), *options, "--no-record"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "fork"),
    reason="kills processes by POSIX signals, which this system does not have",
)
def test_a_killed_training_loses_nothing_and_sees_nothing_twice() -> None:
    # By one process, and by two that share the model.
    for record in found("kill_training.py", "--kills", "1", "--steps", "12").values():
        assert record["weights"] == "equal to the bit"
        assert record["samples_of_every_step"] == "equal"


def test_a_killed_generation_loses_nothing_and_pays_nothing_twice() -> None:
    record = found("kill_generate.py", "--kills", "3", "--images", "40")
    assert record["kills"] == 3 and record["paid"] == 40
    assert 0 < record["paid_after_each"][0] <= record["paid_after_each"][-1] == 40
