"""The job script of `pumice launch slurm`, run by bash with Slurm's commands played."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import Run

ASKED = ("llava15-7b", "model.vision_layer=-2", "--out", "runs/a b", "--nodes", "2")
SRUN = """#!/usr/bin/env bash
shift # --kill-on-bad-exit=1
for process in 0 9; do SLURM_PROCID=$process SLURM_LOCALID=$((process % 8)) "$@"; done
"""
PYTHON = """#!/usr/bin/env bash
printf '%s|' "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$LOCAL_WORLD_SIZE" "$MASTER_ADDR" \\
  "$MASTER_PORT" "$OMP_NUM_THREADS" "$@"
echo
"""


def script(run: Run, *more: str) -> str:
    code, out, err = run("launch", "slurm", *ASKED, *more)
    assert (code, err) == (0, "")
    return out


def test_each_process_runs_the_recipe_in_its_place(run: Run, tmp_path: Path) -> None:
    played = {"srun": SRUN, "scontrol": "#!/bin/sh\nprintf 'one\\ntwo\\n'\n", "python": PYTHON}
    for name, text in played.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "16",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-s"], input=script(run), env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    command = "-m|pumice|run|llava15-7b|model.vision_layer=-2|--out|runs/a b|"
    assert done.stdout.splitlines() == [
        f"0|0|16|8|one|23456|8|{command}",
        f"9|1|16|8|one|23456|8|{command}",
    ]


def test_options_of_the_run_reach_its_processes(run: Run) -> None:
    given = ("--feature-cache", "features of mine", "--feature-cache-gb", "2.5")
    text = script(run, *given, "--track", "tensorboard", "--track", "wandb")
    words = shlex.split(text.splitlines()[-1])
    assert words[-8:] == [*given, "--track", "tensorboard", "--track", "wandb"]
    code, _, err = run("launch", "slurm", *ASKED, "--track", "tensorbord")
    assert code == 2 and "Did you mean 'tensorboard'" in err


def test_what_is_asked_of_slurm(run: Run) -> None:
    lines = script(run, "--partition", "gpu", "--time", "10:00:00").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    asked = {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu",
             "--time=10:00:00", "--signal=TERM@300"}  # fmt: skip
    assert asked <= {line.removeprefix("#SBATCH ") for line in lines}


@pytest.mark.skipif(
    shutil.which("shellcheck") is None,
    reason="shellcheck is not installed (Debian: apt install shellcheck)",
)
def test_shellcheck_has_nothing_to_say(run: Run) -> None:
    done = subprocess.run(
        ["shellcheck", "-"], input=script(run), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_step_that_cannot_be_shared_is_refused(run: Run) -> None:
    code, _, err = run("launch", "slurm", *ASKED, "--gpus-per-node", "3")
    assert code == 2 and "6 processes take equal shares" in err
    code, _, err = run("launch", "slurm", *ASKED, "stages.tune.micro_batch_size=64")
    assert code == 2 and "stages.tune.micro_batch_size" in err
