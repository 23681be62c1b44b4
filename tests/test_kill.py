"""A training on shards that is killed comes out as if it had not been (kill_training.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kill_training.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_twice_nothing_is_lost_and_nothing_twice() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "2", "--steps", "18", "--no-record"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] == "equal to the bit" and found["samples_of_every_step"] == "equal"
