"""A study's intervals: right in simulation, and a verdict only where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from pumice.study.statistics import (
    Estimate,
    Measured,
    differences,
    estimates,
    stacked,
    verdict,
)
from simulated_studies import PICTURES, RIGHT, arm, gap


def test_of_a_null_study_at_least_19_in_20_see_no_difference() -> None:
    found = [gap(draw, 0.0) for draw in range(100, 200)]
    assert sum(one.sign == 0 for one in found) >= 95
    assert sum(verdict(one, "accuracy") == "no difference at this size" for one in found) >= 95


def test_a_planted_effect_is_found_with_its_sign() -> None:
    for effect, word in ((2.0, "better"), (-2.0, "worse")):
        found = [verdict(gap(draw, effect, noise=0.1), "accuracy") for draw in range(5)]
        assert found.count(word) == 5


def test_drawing_the_pictures_alone_would_find_what_is_not_there() -> None:
    """The reason for the level of the seeds: without it a null study fails."""
    wrong = 0
    for draw in range(20):
        rng = np.random.default_rng(draw)
        hard = rng.standard_normal(PICTURES)
        base, other = (arm(rng, 1.0, hard, seeds=1) for _ in range(2))
        wrong += differences(RIGHT, base, other)["accuracy"].sign != 0
    assert wrong > 3


def test_equal_runs_differ_by_nothing_and_pictures_pair() -> None:
    rng = np.random.default_rng(0)
    hard = 3 * rng.standard_normal(PICTURES)
    base = arm(rng, 0.0, hard)
    same = differences(RIGHT, base, base)["accuracy"]
    assert (same.value, same.interval, same.sign) == (0.0, (0.0, 0.0), 0)
    # One more right answer for every seed on the same three pictures: small, and certain.
    better = base.sums.copy()
    places = np.flatnonzero((base.sums[:, :, 0] < 2).all(axis=0))[:12]
    better[:, places, 0] += 1
    found = differences(RIGHT, base, Measured(base.seeds, base.names, better))["accuracy"]
    own = estimates(RIGHT, base)["accuracy"]
    assert found.sign == 1 and own.interval is not None and found.interval is not None
    assert found.interval[1] - found.interval[0] < 0.5 * (own.interval[1] - own.interval[0])


def test_only_seeds_that_both_have_are_compared() -> None:
    rng = np.random.default_rng(1)
    hard = rng.standard_normal(PICTURES)
    base, other = arm(rng, 0.0, hard), arm(rng, 1.0, hard)
    lacking = other.of_seeds([2, 0])
    found = differences(RIGHT, base, lacking)["accuracy"]
    points = [estimates(RIGHT, m)["accuracy"].seeds for m in (base, other)]
    assert found.seeds == pytest.approx([points[1][s] - points[0][s] for s in (0, 2)])
    assert differences(RIGHT, base, Measured((7,), other.names, other.sums[:1])) == {}


def test_one_seed_says_that_it_is_one() -> None:
    found = gap(0, 3.0, seeds=1)
    assert verdict(found, "accuracy") == "better (one seed)"


@pytest.mark.parametrize(
    ("metric", "value", "word"),
    [("accuracy", 1.0, "better"), ("chair_i", 1.0, "worse"), ("chair_s", -1.0, "better"),
     ("yes_ratio", 1.0, "higher"), ("words", -1.0, "lower")],
)  # fmt: skip
def test_which_way_is_better(metric: str, value: float, word: str) -> None:
    clear = Estimate(value, (value - 0.5, value + 0.5), (value, value))
    assert verdict(clear, metric) == word
    assert verdict(Estimate(value, None, (value,)), metric) == "not defined here"
    assert verdict(None, metric) == "not measured"


def test_sums_of_seeds_meet_by_name() -> None:
    one = (["n", "score/a"], np.array([[1.0, 2.0]]))
    two = (["n/b", "n"], np.array([[3.0, 4.0]]))
    both = stacked({0: one, 1: two})
    assert both.names == ("n", "score/a", "n/b")
    assert both.sums.tolist() == [[[1, 2, 0]], [[4, 0, 3]]]
