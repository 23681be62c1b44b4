"""A study is killed (SIGKILL) at random moments and started again: its table stays the same.

    OMP_NUM_THREADS=1 python benchmarks/kill_study.py --kills 10

Two connectors, two seeds, a few steps of the pocket. The study is run once without a stop. Then
again, in a process that is killed and started anew: every second time with the run it was working
on, as when a machine goes down, else alone, so that the run goes on without its study and the next
one has to wait for it. What must hold at the end: the same table, every checkpoint the same to the
bit, each run's metrics.jsonl with every step once, and no stage trained under two names. Writes
benchmarks/results/kill_study.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import where, write

from pumice.core.files import sha256_file, write_atomic
from pumice.recipe.yaml_text import dump_yaml

STEPS = {"align": 8, "tune": 12}
RUNS = 4
STUDY = {
    "name": "killed",
    "base": "pocket-quick",
    "set": {
        "world.images": 60,
        "world.eval_images": 20,
        "stages.align.steps": STEPS["align"],
        "stages.tune.steps": STEPS["tune"],
        "stages.align.batch_size": 4,
        "stages.tune.batch_size": 4,
    },
    "axes": {"connector": {"path": "model.connector", "values": ["mlp2x_gelu", "linear"]}},
    "seeds": [0, 1],
    "evaluations": ["pope", "vqav2"],
    "limit": 60,
}


def main() -> None:
    """Kill, compare, and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="only check")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_atomic(root / "study.yaml", dump_yaml(STUDY))
        begin = time.monotonic()
        finish(root, "whole")
        seconds = time.monotonic() - begin
        finished = kill_until_done(root, args.kills, args.seed, seconds)
        compare(root)
    found = {"kills": args.kills, "runs_finished_at_each": finished, "runs": RUNS,
             "table": "equal", "checkpoints": "equal to the bit"}  # fmt: skip
    if not args.no_record:
        write("kill_study.json", where("kill_study.py") | found)
    else:
        sys.stdout.write(json.dumps(found) + "\n")


def started(root: Path, name: str) -> subprocess.Popen[bytes]:
    """A process that runs the study with a store of its own."""
    with (root / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pumice", "-q", "study", root / "study.yaml",
             "--out", root / name],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=log,
            stderr=log,
        )  # fmt: skip


def finish(root: Path, name: str) -> None:
    """The study to its end."""
    if started(root, name).wait():
        raise SystemExit(f"the study failed: {(root / 'log').read_text()[-2000:]}")


def kill_until_done(root: Path, kills: int, seed: int, seconds: float) -> list[int]:
    """Kills so many processes, spread over the whole study; gives the runs finished at each."""
    chance, finished = random.Random(seed), []
    for number in range(kills):
        process = started(root, "killed")
        # Long enough that a run can be finished between two kills.
        end = time.monotonic() + chance.uniform(0, 2 * seconds / kills + seconds / RUNS)
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        below = children(process.pid) if number % 2 else []
        for victim in (process.pid, *below):
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        finished.append(len(list((root / "killed" / "store" / "runs").glob("*/cell.json"))))
    finish(root, "killed")
    return finished


def children(process: int) -> list[int]:
    """The processes that this one has started."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(word) for word in text.split()]


def compare(root: Path) -> None:
    """Both studies' tables, checkpoints and steps; raises where they differ."""
    whole, killed = (root / name for name in ("whole", "killed"))
    if table(whole) != table(killed):
        raise SystemExit("the table is not that of the study without a stop")
    if weights(whole) != weights(killed):
        raise SystemExit("the checkpoints are not those of the study without a stop")
    for run in (killed / "store" / "runs").iterdir():
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [(row["stage"], row["step"]) for row in rows]
        right = [(stage, step + 1) for stage, count in STEPS.items() for step in range(count)]
        if steps != right:
            raise SystemExit(f"{run.name} has the steps {steps}")


def table(out: Path) -> list[dict[str, Any]]:
    """The arms of study.json without what they took."""
    arms = json.loads((out / "study.json").read_text())["arms"]
    return [{key: value for key, value in arm.items() if key != "cost"} for arm in arms]


def weights(out: Path) -> dict[str, str]:
    """The hash of every shared stage's weights, by the fingerprint it is kept under."""
    files = (out / "store" / "stages").glob("*/checkpoint/*.safetensors")
    return {path.parts[-3]: sha256_file(path) for path in files}


if __name__ == "__main__":
    main()
