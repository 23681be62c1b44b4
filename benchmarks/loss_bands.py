"""The loss bands of shipped recipes, made of finished runs of them with several seeds.

    for seed in 0 1 2; do pumice run pocket seed=$seed data=runs/world-6000 eval=null \\
        --out runs/bands/pocket-$seed; done
    python benchmarks/loss_bands.py runs/bands/*

A run counts for the stages it has finished whose choices are those of a shipped recipe
(`pumice.recipe.loss_bands.choices`); what does not is named. Of several runs with one seed the last
one given counts. Stages with three seeds get a band; those that are not among the runs given keep
theirs, and what belongs to no shipped recipe any more goes. Writes
src/pumice/recipe/loss_bands.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pumice.core.files import read_json, write_atomic
from pumice.recipe.load import load_recipe, recipe_names
from pumice.recipe.loss_bands import BANDS, choices
from pumice.train.loss_band import LEAST_RUNS, band_of_runs
from pumice.train.metrics import METRICS, stage_rows


def main() -> None:
    """Read the runs, write the bands, and say what is still without one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    shipped = {
        choices(recipe, stage): (name, stage)
        for name in recipe_names()
        for recipe in [load_recipe(name)]
        for stage, _ in recipe.stage_list()
        if recipe.world is not None
    }
    losses: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for run in parser.parse_args().runs:
        recipe = load_recipe(str(run / "recipe.yaml"))
        for stage, chosen in recipe.stage_list():
            found = [row["loss"] for row in stage_rows(run / METRICS, stage)]
            made = choices(recipe, stage)
            if made in shipped and len(found) == chosen.steps:
                losses[made][recipe.seed] = found
            else:
                say(f"{run}: {stage} is not a whole stage of a shipped recipe")
    known = {entry["choices"]: entry for entry in (read_json(BANDS) if BANDS.is_file() else [])}
    for made, runs in losses.items():
        name, stage = shipped[made]
        if len(runs) < LEAST_RUNS:
            say(f"{name}, {stage}: seeds {sorted(runs)}; {LEAST_RUNS} are needed")
        else:
            band = asdict(band_of_runs(name, runs))
            known[made] = {"recipe": name, "stage": stage, "choices": made, **band}
    write_atomic(BANDS, text([known[made] for made in shipped if made in known]))
    for made, (name, stage) in shipped.items():
        say(f"{name}, {stage}: {'has a band' if made in known else 'has none'}")


def text(entries: list[dict[str, Any]]) -> str:
    """JSON with one line a key, so that a changed band is a few changed lines."""
    blocks = [
        " {\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items())
        + "\n }"
        for entry in entries
    ]
    return "[\n" + ",\n".join(blocks) + "\n]\n"


def say(line: str) -> None:
    """To the one who runs it."""
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
