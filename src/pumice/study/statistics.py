"""How sure a difference is: over other pictures and over other seeds, at once.

A score varies with the pictures that were asked about and with the seed that trained the model.
Pictures are drawn anew (a bootstrap over groups of items), the same ones for every arm and seed, so
that what makes a picture hard cancels in a difference. Seeds are too few to be drawn anew: of three
there are ten draws, and their spread comes out a third too small. Their level is drawn from what a
mean of S numbers is known to follow, Student's t with S - 1 degrees of freedom around it. A draw of
a difference is the difference over the drawn pictures plus the drawn error of the seeds, and the
interval holds the middle 95 % of the draws.

What a seed and a picture do together is in both levels, so intervals are a little too wide rather
than too narrow. With one seed only the pictures are drawn, and a verdict is about that seed.

Shapes: S seeds, G groups of items (pictures), K sums of a benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pumice.eval.benchmark import Benchmark, Floats, Sums
from pumice.eval.metrics import drawn_sums

PICTURE_DRAWS = 1000
DRAWS = 20_000
# Of metrics that are not here, more is better.
_DIRECTIONS = {
    "chair_i": -1,
    "chair_s": -1,
    "unparsed": -1,
    "mean_distance": -1,
    "yes_ratio": 0,
    "words": 0,
    "answer_words": 0,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One benchmark's sums of an arm: float[S, G, K] by seed and picture."""

    seeds: tuple[int, ...]
    names: tuple[str, ...]
    sums: Floats

    def of_seeds(self, seeds: Sequence[int]) -> Measured:
        """Those of some of its seeds, in this order."""
        places = [self.seeds.index(seed) for seed in seeds]
        return Measured(tuple(seeds), self.names, self.sums[places])


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; None where it cannot be known."""

    value: float
    interval: tuple[float, float] | None
    seeds: tuple[float, ...]
    """Of each seed."""

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out zero, else 0."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return 0
        return 1 if self.value > 0 else -1


def estimates(benchmark: Benchmark, measured: Measured, *, draw: int = 0) -> dict[str, Estimate]:
    """Every metric of an arm: the mean of its seeds. `draw` is the seed of the drawing."""
    points, drawn = _points_and_draws(benchmark, measured, draw)
    return {
        name: _estimate(points[name], drawn[name].mean(axis=1), name, benchmark.decimals, draw)
        for name in points
    }


def differences(
    benchmark: Benchmark, base: Measured, other: Measured, *, draw: int = 0
) -> dict[str, Estimate]:
    """Every metric of `other` less that of `base`, over the seeds that both have.

    The two must be about the same pictures in the same order.
    """
    shared = [seed for seed in base.seeds if seed in other.seeds]
    if not shared:
        return {}
    pairs = [_points_and_draws(benchmark, one.of_seeds(shared), draw) for one in (base, other)]
    (base_points, base_drawn), (points, drawn) = pairs
    return {
        name: _estimate(
            points[name] - base_points[name],
            (drawn[name] - base_drawn[name]).mean(axis=1),
            name,
            benchmark.decimals,
            draw,
        )
        for name in points
        if name in base_points
    }


def direction(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither is."""
    return _DIRECTIONS.get(metric, 1)


def verdict(difference: Estimate | None, metric: str) -> str:
    """The difference in plain words. `metric` says which way is better."""
    if difference is None:
        return "not measured"
    if difference.interval is None:
        return "not defined here"
    sign = difference.sign
    if sign == 0:
        words = "no difference at this size"
    else:
        better = direction(metric)
        words = (
            ("higher" if sign > 0 else "lower")
            if better == 0
            else ("better" if sign == better else "worse")
        )
    return f"{words} (one seed)" if len(difference.seeds) == 1 else words


def _points_and_draws(
    benchmark: Benchmark, measured: Measured, draw: int
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Per metric float[S] and float[draws, S], the latter over pictures drawn anew."""
    seeds, groups, names = measured.sums.shape
    # `draw` gives every arm and seed the same pictures: the differences are paired.
    flat = measured.sums.transpose(1, 0, 2).reshape(groups, seeds * names)
    sums = drawn_sums(flat, PICTURE_DRAWS, draw).reshape(PICTURE_DRAWS, seeds, names)
    points = benchmark.metrics(Sums(measured.names, measured.sums.sum(axis=1)))
    drawn = benchmark.metrics(Sums(measured.names, sums))
    return dict(points), dict(drawn)


def _estimate(points: Floats, pictures: Floats, name: str, decimals: int, draw: int) -> Estimate:
    """float[S] of the seeds and float[draws] of their mean over drawn pictures."""
    value = round(float(points.mean()), decimals)
    seeds = tuple(round(float(point), decimals) for point in points)
    known = pictures[~np.isnan(pictures)]
    if not known.size or np.isnan(points).any():
        return Estimate(value, None, seeds)
    rng = np.random.default_rng([draw, 1])
    drawn = known[rng.integers(len(known), size=DRAWS)]
    if len(points) > 1:
        error = float(points.std(ddof=1)) / np.sqrt(len(points))
        drawn = drawn + error * rng.standard_t(len(points) - 1, size=DRAWS)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, (round(float(low), decimals), round(float(high), decimals)), seeds)


def stacked(tables: Mapping[int, tuple[Sequence[str], Floats]]) -> Measured:
    """One table of sums for several seeds: (names, float[G, K]) by seed -> float[S, G, K].

    Sums that one of them lacks are zero there.
    """
    names = tuple(dict.fromkeys(name for own, _ in tables.values() for name in own))
    column = {name: place for place, name in enumerate(names)}
    layers = []
    for own, values in tables.values():
        layer = np.zeros((len(values), len(names)))
        layer[:, [column[name] for name in own]] = values
        layers.append(layer)
    return Measured(tuple(tables), names, np.stack(layers))
