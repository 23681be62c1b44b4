"""Studies without models: answers drawn from a known law, so that the right verdict is known.

Every picture is hard to some degree, the same for all models, and every trained model is as good as
its arm and its seed make it.
"""

from __future__ import annotations

import numpy as np

from pumice.eval.benchmark import Benchmark, Floats, Sums, percent, ratio
from pumice.study.statistics import Estimate, Measured, differences

PICTURES, SEEDS = 120, 3


class Right(Benchmark):
    """A benchmark of nothing but right and wrong: what it reads is never asked for here."""

    name = "right"
    title = "Right"
    headline = "accuracy"
    decimals = 4
    load = parse = score = tally = protocol = None  # type: ignore[assignment]

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        return {"accuracy": percent(sums["right"], sums["n"]), "words": ratio(sums["w"], sums["n"])}


Right.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
RIGHT = Right()


def arm(
    rng: np.random.Generator, level: float, hard: Floats, *, seeds: int = SEEDS, noise: float = 0.3
) -> Measured:
    """Answers of models whose seeds differ, to two questions on each picture, some harder."""
    seed_levels = level + noise * rng.standard_normal((seeds, 1))
    chance = 1 / (1 + np.exp(-(seed_levels + hard)))
    right = rng.binomial(2, chance).astype(float)
    sums = np.stack([right, np.full_like(right, 2.0), 6 + right], axis=-1)
    return Measured(tuple(range(seeds)), ("right", "n", "w"), sums)


def gap(draw: int, effect: float, *, seeds: int = SEEDS, noise: float = 0.3) -> Estimate:
    """The difference that a study of two arms finds; `effect` is the true one in log odds."""
    rng = np.random.default_rng(draw)
    hard = rng.standard_normal(PICTURES)
    base = arm(rng, 1.0, hard, seeds=seeds, noise=noise)
    other = arm(rng, 1.0 + effect, hard, seeds=seeds, noise=noise)
    return differences(RIGHT, base, other)["accuracy"]
