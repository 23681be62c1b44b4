"""Where the loss of healthy runs of a recipe lies over the steps of a stage, and who leaves it.

A band is made of finished runs with different seeds. What is compared is the mean loss of a window
of steps: single steps scatter by their data.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pumice.core.errors import PumiceError

log = logging.getLogger(__name__)

# A band needs so many runs of different seeds.
LEAST_RUNS = 3
# Windows of a fortieth of a stage, and of ten steps at least.
_WINDOWS, _LEAST_WINDOW = 40, 10
# Seeds differ most in when the loss begins to fall: the band reaches from the least to the largest
# value of any run within a tenth of the stage to either side, and a quarter beyond.
_REACH, _MARGIN = 0.1, 1.25
# One window may fall out by chance.
_LEFT_AFTER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LossBand:
    """The band of one stage; the k-th entry is that of the k-th window of `window` steps."""

    recipe: str
    seeds: tuple[int, ...]
    window: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def steps(self) -> list[int]:
        """The last step of each window."""
        return [self.window * (place + 1) for place in range(len(self.low))]

    @property
    def end(self) -> tuple[float, float]:
        """Where healthy runs end."""
        return self.low[-1], self.high[-1]

    @property
    def title(self) -> str:
        """Whose band it is, in words."""
        return f"healthy runs of {self.recipe}, seeds {', '.join(map(str, self.seeds))}"


def band_of_runs(recipe: str, runs: dict[int, Sequence[float]]) -> LossBand:
    """The band of finished runs: for each seed the loss of every step."""
    lengths = {len(losses) for losses in runs.values()}
    if len(runs) < LEAST_RUNS or len(lengths) != 1:
        raise PumiceError(
            f"a band of the loss of {recipe} was asked for with {len(runs)} seeds and "
            f"{', '.join(map(str, sorted(lengths)))} steps; {LEAST_RUNS} seeds at least, and "
            f"runs of one length, are needed. Train the recipe with more seeds."
        )
    window = max(_LEAST_WINDOW, lengths.pop() // _WINDOWS)
    means = np.array([_window_means(losses, window) for losses in runs.values()])
    count = means.shape[1]
    reach = max(1, round(_REACH * count))
    near = [means[:, max(0, n - reach) : n + reach + 1] for n in range(count)]
    return LossBand(
        recipe=recipe,
        seeds=tuple(sorted(runs)),
        window=window,
        low=tuple(_short(part.min() / _MARGIN) for part in near),
        high=tuple(_short(part.max() * _MARGIN) for part in near),
    )


def _window_means(losses: Sequence[float], window: int) -> list[float]:
    whole = len(losses) // window * window
    means: list[float] = np.reshape(losses[:whole], (-1, window)).mean(1).tolist()
    return means


def _short(value: float) -> float:
    return float(f"{value:.4g}")


class LossWatch:
    """Compares a training with the band of its recipe, and says so once when it has left it."""

    def __init__(self, band: LossBand, stage: str, earlier: Iterable[dict[str, Any]] = ()) -> None:
        """`earlier` are the rows of metrics.jsonl that a run which goes on has written before."""
        self.band, self.stage = band, stage
        self.outside: list[dict[str, Any]] = []
        """The windows outside of the band: their last step, mean, and the band there."""
        self._losses: deque[float] = deque(maxlen=band.window)
        self.left = False
        """Whether so many windows running were outside that it is no chance."""
        self._running = 0
        for row in earlier:
            self._losses.append(row["loss"])
            self._count(row.get("loss_band"))

    def __call__(self, step: int, loss: float) -> dict[str, Any] | None:
        """After each step: at the end of a window, what it has come to."""
        self._losses.append(loss)
        place, rest = divmod(step, self.band.window)
        if rest or place > len(self.band.low):
            return None
        low, high = self.band.low[place - 1], self.band.high[place - 1]
        mean = _short(sum(self._losses) / len(self._losses))
        found = {"step": step, "mean": mean, "low": low, "high": high,
                 "outside": not low <= mean <= high}  # fmt: skip
        known = self.left
        self._count(found)
        if self.left and not known:
            log.warning(self.told(found))
        return found

    def _count(self, found: dict[str, Any] | None) -> None:
        if found is None:
            return
        self._running = self._running + 1 if found["outside"] else 0
        self.left = self.left or self._running >= _LEFT_AFTER
        if found["outside"]:
            self.outside.append(found)

    def told(self, found: dict[str, Any]) -> str:
        """What to say of a window outside of the band."""
        side = "above" if found["mean"] > found["high"] else "below"
        look = _ABOVE if side == "above" else _BELOW
        return (
            f"stage {self.stage}: loss {found['mean']:.3g} at step {found['step']} (mean of "
            f"{self.band.window} steps) is {side} the band of {self.band.title}, which lie in "
            f"{found['low']:.3g} .. {found['high']:.3g} there. {look}"
        )

    def summary(self) -> dict[str, Any]:
        """For training.json: the band, and the windows outside of it."""
        words = self.told(self.outside[-1]) if self.left else ""
        return {**asdict(self.band), "outside": self.outside, "warning": words}


_ABOVE = (
    "The settings are the recipe's, so look at what they do not say: the data (pumice data verify, "
    "pumice data show), the weights of the backbones, the versions (pumice doctor)."
)
_BELOW = (
    "It learns what it should not be able to: look whether answers stand in the questions, or few "
    "rows come again and again (pumice data show)."
)
