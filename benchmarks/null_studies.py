"""Studies whose truth is known, by the hundred: how often an interval leaves out zero.

    python benchmarks/null_studies.py

Answers are drawn from a law (tests/simulated_studies.py): two arms of three seeds on 120 pictures
with two questions each. In a null study the arms are alike but for their seeds; in the others one
is better. `noise` is how far seeds lie apart, `effect` how far the arms do, both in log odds (0.3
is about five points of accuracy here). Writes benchmarks/results/null_studies.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from measured import where, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from simulated_studies import PICTURES, SEEDS, gap

NOISES = (0.0, 0.1, 0.3, 0.6)
EFFECTS = (0.25, 0.5, 1.0, 2.0)
NOISE_OF_EFFECTS = 0.1


def main() -> None:
    """Draw, count, and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=400)
    studies = parser.parse_args().studies
    null = [counted(studies, noise, 0.0) for noise in NOISES]
    planted = [counted(studies, NOISE_OF_EFFECTS, effect) for effect in EFFECTS]
    least = min(entry["no_difference"] for entry in null)
    if least < 0.95 * studies:
        raise SystemExit(f"only {least} of {studies} null studies saw no difference")
    shape = {"studies_each": studies, "seeds": SEEDS, "pictures": PICTURES}
    write(
        "null_studies.json", where("null_studies.py") | shape | {"null": null, "planted": planted}
    )


def counted(studies: int, noise: float, effect: float) -> dict[str, Any]:
    """What so many studies of one kind find."""
    found = [gap(draw, effect, noise=noise) for draw in range(studies)]
    signs = [one.sign for one in found]
    return {
        "noise": noise,
        "effect": effect,
        "no_difference": signs.count(0),
        "better": signs.count(1),
        "worse": signs.count(-1),
        "mean_difference": round(mean(one.value for one in found), 2),
        "mean_width": round(mean(b - a for a, b in (one.interval or (0, 0) for one in found)), 2),
    }


if __name__ == "__main__":
    main()
