"""Tiles against one view, on scenes with small things: several seeds, equal steps and backbones.

    python benchmarks/hd.py --out runs/hd --seeds 0 1 2

Writes benchmarks/results/hd.json. Finished runs in --out are not run again.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pocket import machine

from pumice.eval.benchmark import Item
from pumice.eval.benchmarks import BENCHMARKS
from pumice.world.datasets import EVAL_SCENES, SEED_STRIDE
from pumice.world.scenes import SHAPES, random_scene

RESULTS = Path(__file__).resolve().parent / "results" / "hd.json"
# Every arm trains the same recipe on the same pictures in the same order; one line differs.
ARMS = {
    "one view": ["model.image=pad", "model.tiling={}"],
    "tiles": [],
    "tiles without the whole": ["model.tiling={max_tiles: 4, global_view: false}"],
}
PAIRS = (("tiles", "one view"), ("tiles", "tiles without the whole"))
DRAWS = 2000
# Questions about one thing, whose size the scene tells; and about the scene as a whole.
OF_ONE_THING = ("color", "texture", "size")
OF_THE_SCENE = ("where", "count", "relation", "background")


def main() -> None:
    """Run every arm and seed that is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="what a reader of the results must know")
    arguments = parser.parse_args()
    arms = {
        arm: {str(s): one_run(arm, s, arguments.out, arguments.overrides) for s in arguments.seeds}
        for arm in arguments.arms
    }
    record = {
        "recipe": "pocket-hd",
        "overrides": arguments.overrides,
        "command": " ".join(
            ["python benchmarks/hd.py --out runs/hd --seeds", *map(str, arguments.seeds)]
            + (["--set", *arguments.overrides] if arguments.overrides else [])
        ),
        "machine": machine(),
        "note": arguments.note,
        "protocol": "held-out wide scenes, greedy; accuracy in percent; small: questions about a "
        "small thing; scene: " + ", ".join(OF_THE_SCENE),
        "arms": {arm: {"summary": summary(list(runs.values())), "seeds": runs}
                 for arm, runs in arms.items()},
        "differences": {
            f"{one} minus {other}": differences(arguments.out, one, other, arguments.seeds)
            for one, other in PAIRS if one in arms and other in arms
        },
    }  # fmt: skip
    arguments.results.write_text(json.dumps(record, indent=1) + "\n")


def one_run(arm: str, seed: int, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and judge one arm with one seed (unless it is there) and collect its figures."""
    folder = folder_of(out, arm, seed)
    timing = folder / "timing.json"
    if not timing.is_file():
        start = time.monotonic()
        command = ["run", "pocket-hd", f"seed={seed}", f"data={out / 'data'}", *ARMS[arm]]
        command += [*overrides, "--out", str(folder)]
        subprocess.run([sys.executable, "-m", "pumice", *command], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cost = {
            "wall_seconds": round(time.monotonic() - start, 1),
            "peak_memory_gib": round(used.ru_maxrss / 2**20, 2),
        }
        timing.write_text(json.dumps(cost))
    return json.loads(timing.read_text()) | accuracies(folder, out / "data")


def accuracies(folder: Path, data: Path) -> dict[str, Any]:
    """Percent right by kind of question, and of small things, signs and the scene as a whole."""
    groups: dict[str, list[float]] = {}
    score = scores(folder)
    for item in BENCHMARKS["vqav2"].load(data):
        if item.id in score:
            for name in kinds(item):
                groups.setdefault(name, []).append(score[item.id])
    return {
        name: {"accuracy": round(100 * statistics.mean(values), 2), "n": len(values)}
        for name, values in sorted(groups.items())
    }


def scores(folder: Path) -> dict[str, float]:
    """The score of each question by its id."""
    rows = (folder / "eval" / "vqav2" / "predictions.jsonl").read_text().splitlines()
    return {row["id"]: row["score"] for row in map(json.loads, rows)}


def kinds(item: Item) -> list[str]:
    """The groups a question counts in."""
    names = [item.category]
    if item.category in OF_ONE_THING:
        names.append(f"{size_asked(item.id, item.prompt)} things")
    if item.category in OF_THE_SCENE:
        names.append("scene")
    return names


def differences(out: Path, one: str, other: str, seeds: list[int]) -> dict[str, Any]:
    """Points between two arms on the same questions, by group, with two 95 % intervals.

    `images`: whole pictures are drawn anew, seeds kept, so it says what other questions would give;
    `seeds`: Student's t over the seeds' differences, so it says what other seeds would give.
    """
    gains: dict[str, dict[str, list[Any]]] = {}
    both = [[scores(folder_of(out, arm, seed)) for arm in (one, other)] for seed in seeds]
    for item in BENCHMARKS["vqav2"].load(out / "data"):
        if item.id in both[0][0]:
            gain = [100 * (a[item.id] - b[item.id]) for a, b in both]
            for name in kinds(item):
                gains.setdefault(name, {}).setdefault(item.group, []).append(gain)
    return {name: _difference(list(groups.values())) for name, groups in sorted(gains.items())}


def _difference(groups: list[list[list[float]]]) -> dict[str, Any]:
    """Gains by picture, question and seed -> their mean and both intervals."""
    sums = np.array([np.sum(rows, axis=0) for rows in groups])  # pictures x seeds
    counts = np.array([len(rows) for rows in groups])
    draws = np.random.default_rng(0).multinomial(
        len(groups), np.full(len(groups), 1 / len(groups)), size=DRAWS
    )
    low, high = np.percentile((draws @ sums).mean(axis=1) / (draws @ counts), [2.5, 97.5])
    by_seed = sums.sum(axis=0) / counts.sum()
    found = {
        "mean": round(float(by_seed.mean()), 2),
        "images": [round(float(low), 2), round(float(high), 2)],
        "by_seed": [round(float(value), 2) for value in by_seed],
        "n": int(counts.sum()),
    }
    if len(by_seed) > 1:
        half = T_95[len(by_seed) - 1] * by_seed.std(ddof=1) / len(by_seed) ** 0.5
        found["seeds"] = [round(float(by_seed.mean() + sign * half), 2) for sign in (-1, 1)]
    return found


def folder_of(out: Path, arm: str, seed: int) -> Path:
    """Where a run lies."""
    return out / arm.replace(" ", "-") / f"seed{seed}"


def size_asked(question: str, prompt: str) -> str:
    """The size of the thing a question names; scenes are made again from their seeds."""
    index = int(question) // 1000 - 1
    scene = random_scene(EVAL_SCENES + 0 * SEED_STRIDE + index)
    words = prompt.replace("?", " ").split()
    [shape] = [name for name in SHAPES if name in words]
    return next(thing.size for thing in scene.shapes if thing.shape == shape)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds and half the width of its 95 % interval (t, so wide for few seeds)."""
    found: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name]["accuracy"] if isinstance(first, dict) else run[name] for run in runs]
        found[name] = {"mean": round(statistics.mean(values), 2), "seeds": values}
        if len(values) > 1:
            spread = statistics.stdev(values) / len(values) ** 0.5
            found[name]["half_interval"] = round(T_95[len(values) - 1] * spread, 2)
    return found


# Student's t for 95 %, by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


if __name__ == "__main__":
    main()
