"""Bands of the loss: healthy runs lie in them, others are told, and each belongs to its recipe."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.eval.charts import Band, loss_chart
from pumice.recipe.load import load_recipe
from pumice.recipe.loss_bands import BANDS, choices, loss_band
from pumice.train.loss_band import LossBand, LossWatch, band_of_runs

BAND = LossBand(recipe="r", seeds=(0, 1, 2), window=5, low=(1.0,) * 6, high=(2.0,) * 6)


def falling(seed: int, steps: int = 200, at: float = 0.3) -> list[float]:
    """A loss that falls from 2 to 0.5 about a moment, with the scatter of batches."""
    moments = np.arange(steps) / steps
    curve = 0.5 + 1.5 / (1 + np.exp(30 * (moments - at)))
    scatter = np.random.default_rng(seed).lognormal(0, 0.15, steps)
    found: list[float] = (curve * scatter).tolist()
    return found


def watched(band: LossBand, losses: list[float], earlier: Any = ()) -> LossWatch:
    watch = LossWatch(band, "tune", earlier)
    for place, loss in enumerate(losses):
        watch(len(list(earlier)) + place + 1, loss)
    return watch


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.25, 0.35), min_size=3, max_size=5), st.integers(30, 500))
def test_the_runs_a_band_is_made_of_lie_in_it(moments: list[float], steps: int) -> None:
    runs = {n: falling(n, steps, at) for n, at in enumerate(moments)}
    band = band_of_runs("r", runs)
    assert band.seeds == tuple(range(len(moments))) and band.steps[-1] <= steps
    for losses in runs.values():
        assert watched(band, losses).outside == []


def test_a_healthy_run_of_another_seed_is_silent_and_others_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    band = band_of_runs("pocket", {n: falling(n, at=0.3 + 0.01 * n) for n in range(3)})
    with caplog.at_level(logging.WARNING):
        assert watched(band, falling(7, at=0.33)).summary()["warning"] == ""
        assert caplog.text == ""
        blind = watched(band, [max(1.2, loss) for loss in falling(7)])
        assert caplog.text.count("is above the band of healthy runs of pocket, seeds 0, 1, 2") == 1
        assert "pumice data verify" in blind.summary()["warning"]
        leaking = watched(band, [loss if n < 100 else 0.01 for n, loss in enumerate(falling(7))])
        assert "is below the band" in leaking.summary()["warning"]
    assert {found["step"] for found in leaking.outside} == set(band.steps) - set(range(110))


def test_one_window_outside_is_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    losses = [1.5] * 10 + [9.0] * 5 + [1.5] * 15
    with caplog.at_level(logging.WARNING):
        found = watched(BAND, losses).summary()
    assert (len(found["outside"]), found["warning"], caplog.text) == (1, "", "")


@pytest.mark.parametrize("stop", [3, 10, 12, 20])
def test_a_run_that_goes_on_counts_on(stop: int) -> None:
    losses = [1.5] * 8 + [3.0] * 13 + [1.5] * 9
    whole = LossWatch(BAND, "tune")
    rows = []
    for step, loss in enumerate(losses, 1):
        found = whole(step, loss)
        rows.append({"loss": loss} | ({"loss_band": found} if found else {}))
    resumed = watched(BAND, losses[stop:], rows[:stop])
    assert resumed.summary() == whole.summary() and whole.summary()["warning"]


def test_a_band_needs_seeds_of_one_length() -> None:
    with pytest.raises(PumiceError, match="2 seeds and 200 steps; 3 seeds at least"):
        band_of_runs("pocket", {0: falling(0), 1: falling(1)})
    with pytest.raises(PumiceError, match="100, 200 steps"):
        band_of_runs("pocket", {0: falling(0), 1: falling(1), 2: falling(2, 100)})


def test_recorded_bands_are_those_of_the_shipped_recipes() -> None:
    """A recipe that is changed loses its band: benchmarks/loss_bands.py makes it anew of runs."""
    entries = read_json(BANDS)
    assert entries
    for entry in entries:
        recipe = load_recipe(entry["recipe"])
        assert entry["choices"] == choices(recipe, entry["stage"]), entry["recipe"]
        band = loss_band(recipe, entry["stage"])
        assert band is not None and len(band.seeds) >= 3 and band.recipe == entry["recipe"]
        steps = dict(recipe.stage_list())[entry["stage"]].steps
        assert steps is not None and steps - band.window < band.steps[-1] <= steps
        assert all(0 < low < high for low, high in zip(band.low, band.high, strict=True))


def test_a_band_belongs_to_what_a_stage_computes() -> None:
    def has(*changes: str) -> tuple[bool, bool]:
        recipe = load_recipe("pocket-hd", list(changes))
        return loss_band(recipe, "align") is not None, loss_band(recipe, "tune") is not None

    pieces = ["stages.tune.packing=null", "stages.tune.micro_batch_size=4"]
    watching = ["stages.tune.validation={fraction: 0.01}", "stages.tune.watchdog_minutes=5"]
    assert has() == has("seed=9", "name=mine", "eval=null", "data=elsewhere") == (True, True)
    assert has(*pieces, *watching) == (True, True)
    assert has("stages.tune.steps=50") == (True, False)
    assert has("stages.align.train={connector: 1e-3}") == (False, False)
    assert has("world.images=500") == has("model.connector=linear") == (False, False)
    assert has("world=null", "data=mine") == (False, False)
    assert loss_band(load_recipe("llava15-7b"), "tune") is None


def test_a_chart_draws_the_band_behind_the_curve() -> None:
    points = [(step, 1.5) for step in range(1, 31)]
    band = Band(steps=BAND.steps, low=BAND.low, high=[1.8] * 6, title="healthy <runs>")
    chart = loss_chart(points, "tune", band)
    assert chart.index('class="band"') < chart.index('class="raw"')
    assert "<title>healthy &lt;runs&gt;</title>" in chart
    assert 'class="band"' not in loss_chart(points, "tune")
