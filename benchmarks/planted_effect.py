"""A study finds what was planted: the answers of half of the tuning rows are those of other rows.

    OMP_NUM_THREADS=1 python benchmarks/planted_effect.py --out runs/planted

Two arms of pocket-quick, three seeds. In `half shuffled` every second row with a picture has the
answers of another row of its kind with as many turns: each looks right and is about another
picture. Fails unless the study calls it worse. Writes benchmarks/results/planted_effect.json.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from measured import where, write

from pumice.cli.app import main as pumice
from pumice.cli.world import ensure_world
from pumice.core.files import write_atomic
from pumice.recipe.load import load_recipe
from pumice.recipe.yaml_text import dump_yaml

SHUFFLED = "llava/instruct-half-shuffled.json"
METRICS = ["vqav2.accuracy", "pope.mean_f1"]


def main() -> None:
    """Plant, run the study, and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    world = args.out / "world"
    recipe = load_recipe("pocket-quick")
    assert recipe.world is not None
    ensure_world(world, recipe.world)
    moved = plant(world)
    file = args.out / "planted.yaml"
    write_atomic(file, dump_yaml(study(world.resolve(), args.seeds)))
    try:
        pumice(["study", str(file), "--out", str(args.out / "study")])
    except SystemExit as end:
        if end.code:
            raise
    found = json.loads((args.out / "study" / "study.json").read_text())
    effect = found["arms"][1]["metrics"]
    if effect[METRICS[0]]["verdict"] != "worse":
        raise SystemExit(f"the planted effect was not found: {effect[METRICS[0]]}")
    record = {"rows_with_answers_of_others": moved, "seeds": found["seeds"], "arms": found["arms"]}
    write("planted_effect.json", where("planted_effect.py") | record)


def plant(world: Path) -> int:
    """Writes the shuffled file; gives how many rows have the answers of another."""
    rows = json.loads((world / "llava" / "instruct.json").read_text())
    alike: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows[::2]:
        if "image" in row:
            alike[row["id"].rpartition("_")[0], len(row["conversations"])].append(row)
    rng, moved = random.Random(0), 0
    for group in alike.values():
        rng.shuffle(group)
        answers = [[turn["value"] for turn in row["conversations"][1::2]] for row in group]
        # Each takes those of the next: of two rows or more none keeps its own.
        for row, given in zip(group, answers[1:] + answers[:1], strict=True):
            for turn, value in zip(row["conversations"][1::2], given, strict=True):
                turn["value"] = value
        moved += len(group) if len(group) > 1 else 0
    write_atomic(world / SHUFFLED, json.dumps(rows))
    return moved


def study(world: Path, seeds: int) -> dict[str, Any]:
    """The study file."""
    return {
        "name": "planted",
        "base": "pocket-quick",
        "set": {"world": None, "data": str(world)},
        "axes": {
            "labels": {
                "variants": {
                    "as made": {},
                    "half shuffled": {"stages.tune.data.0.path": SHUFFLED},
                }
            }
        },
        "seeds": list(range(seeds)),
        "limit": 300,
        "metrics": METRICS,
    }


if __name__ == "__main__":
    main()
