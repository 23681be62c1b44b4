"""The report's charts, drawn as inline SVG. Colours come from the page's style by class name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files

import numpy as np

from pumice.eval.benchmark import Floats

Point = tuple[int, float]

# User units of a loss chart; the page scales it to the column. The margins hold the tick labels
# also at the larger letters that narrow screens get.
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
# A loss that falls by more than this factor is drawn on a logarithmic axis: on a linear one
# everything after the first tenth of training is a flat line.
LOG_FROM = 12.0
_MOST_POINTS = 360
# Style sheets by package and name: colours first, which the others use.
COLOURS, REPORT = ("pumice.eval", "colours.css"), ("pumice.eval", "report.css")


@cache
def style_of(*sheets: tuple[str, str]) -> str:
    """The sheets, each as (package, name), one after the other."""
    return "".join((files(package) / name).read_text("utf-8") for package, name in sheets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Where other runs lie: between `low` and `high` at each of `steps`."""

    steps: Sequence[int]
    low: Sequence[float]
    high: Sequence[float]
    title: str
    """Whose band it is, in words."""


def loss_chart(points: Sequence[Point], name: str, band: Band | None = None) -> str:
    """An SVG of one stage's loss: the raw values faint, their running mean on top.

    A band is drawn behind them.
    """
    kept = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if not kept:
        return ""
    steps = np.array([step for step, _ in kept], dtype=np.float64)
    raw = np.array([loss for _, loss in kept], dtype=np.float64)
    smooth = running_mean(raw)
    axis = _Axis(raw, smooth)
    last = max(float(steps[-1]), 1.0)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    parts = [] if band is None else [_band(band, x, axis.y, f"clip-{name}")]
    parts += [_y_ticks(axis), _x_ticks(last, x)]
    for style, values in (("raw", raw), ("smooth", smooth)):
        parts.append(
            _path(style, [(x(s), axis.y(v)) for s, v in _thinned(steps, values)], f"clip-{name}")
        )
    label = f"{escape(name)}: loss from {smooth[0]:.3g} to {smooth[-1]:.3g}"
    box = f'x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT}" height="{HEIGHT - TOP - BOTTOM + 8}"'
    end = f'<circle class="end" cx="{x(last):.1f}" cy="{axis.y(smooth[-1]):.1f}" r="3.5"/>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<clipPath id="clip-{escape(name)}"><rect {box}/></clipPath>{"".join(parts)}{end}</svg>'
    )


def loss_figures(curves: Mapping[str, Sequence[Point]], bands: Mapping[str, Band]) -> list[str]:
    """Each stage's chart under its name, with where its loss began and ended."""
    figures = []
    for name, points in curves.items():
        band = bands.get(name)
        if chart := loss_chart(points, name, band):
            smooth = running_mean(np.array([loss for _, loss in points], dtype=np.float64))
            words = f"{points[-1][0]:,} steps, {smooth[0]:.3g} → {smooth[-1]:.3g}"
            words += f"; grey: {escape(band.title)}" if band else ""
            figures.append(
                f"<figure><figcaption><strong>{escape(name)}</strong>"
                f"<span>{words}</span></figcaption>{chart}</figure>"
            )
    return figures


def interval_plot(
    value: float | None,
    interval: tuple[float, float] | None,
    base_rate: float | None,
    other_image: float | None,
) -> str:
    """An SVG strip on a 0..100 axis: score with interval, base rate, score with another image."""
    marks = [f'<line class="grid" x1="{at}%" x2="{at}%" y1="0" y2="36"/>' for at in _QUARTERS]
    marks.append('<line class="track" x1="0" x2="100%" y1="18" y2="18"/>')
    if base_rate is not None:
        at = f"{_clip(base_rate):.2f}%"
        marks.append(f'<line class="base" x1="{at}" x2="{at}" y1="9" y2="27"/>')
    if other_image is not None:
        marks.append(f'<circle class="blind" cx="{_clip(other_image):.2f}%" cy="18" r="4.5"/>')
    if interval is not None:
        low, high = (f"{_clip(end):.2f}%" for end in interval)
        marks.append(f'<line class="interval" x1="{low}" x2="{high}" y1="18" y2="18"/>')
    if value is not None:
        marks.append(f'<circle class="score" cx="{_clip(value):.2f}%" cy="18" r="5.5"/>')
    return f'<svg class="strip" width="100%" height="36" aria-hidden="true">{"".join(marks)}</svg>'


def interval_axis() -> str:
    """The labels of the strips' common axis."""
    labels = "".join(f'<text x="{at}%" y="12" text-anchor="middle">{at}</text>' for at in _QUARTERS)
    return f'<svg class="strip axis" width="100%" height="16" aria-hidden="true">{labels}</svg>'


def running_mean(values: Floats) -> Floats:
    """float[N] -> float[N] centred mean over about a thirtieth of the curve.

    Centred, because a trailing mean lags behind and shows a falling loss too high; at the ends the
    window shrinks to what is there.
    """
    half = max(1, len(values) // 60) if len(values) > 8 else 0
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    # The last value is the one people quote: it keeps a one-sided window of the full length.
    low, high = index - reach, index + reach + 1
    tail = index > len(values) - 1 - half
    low = np.where(tail, np.maximum(0, index - half), low)
    high = np.where(tail, len(values), high)
    return np.asarray((total[high] - total[low]) / (high - low))


_QUARTERS = (0, 25, 50, 75, 100)


class _Axis:
    """The loss axis: its range, whether it is logarithmic, and its ticks."""

    def __init__(self, raw: Floats, smooth: Floats) -> None:
        # The faint line may leave the picture for a moment; the running mean never does.
        low = min(float(np.percentile(raw, 1)), float(smooth.min()))
        high = max(float(np.percentile(raw, 99)), float(smooth.max()))
        self.log = low > 0 and high / low > LOG_FROM
        if self.log:
            self.low, self.high = low / 1.1, high * 1.1
        else:
            self.low, self.high = (0.0 if low < 0.4 * high else low), high
            if self.low == self.high:
                self.low, self.high = self.low - 0.5, self.high + 0.5
        self.ticks = self._log_ticks() if self.log else nice_ticks(self.low, self.high, 5)

    def y(self, value: float) -> float:
        """Loss -> vertical place in user units."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(number, 1e-12)) for number in (value, low, high))
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        fine = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        inside = [tick for tick in fine if self.low <= tick <= self.high]
        if len(inside) <= 7:
            return inside
        return [tick for tick in inside if math.isclose(math.log10(tick) % 1, 0, abs_tol=1e-9)]


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside a range, about that many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _y_ticks(axis: _Axis) -> str:
    parts = []
    for tick in axis.ticks:
        y = axis.y(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 10}" y="{y:.1f}" dy=".34em" text-anchor="end">{tick:g}</text>'
        )
    scale = "loss, log scale" if axis.log else "loss"
    parts.append(f'<text class="name" x="{WIDTH - RIGHT}" y="{TOP + 6}" text-anchor="end">{scale}')
    return "".join(parts) + "</text>"


def _x_ticks(last: float, x: Callable[[float], float]) -> str:
    base = HEIGHT - BOTTOM + 4
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for tick in nice_ticks(0.0, last, 5):
        at = x(tick)
        parts.append(
            f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 5}"/>'
            f'<text x="{at:.1f}" y="{base + 24}" text-anchor="middle">{tick:,.0f}</text>'
        )
    place = f'x="{LEFT - 14}" y="{base + 24}"'
    parts.append(f'<text class="name" {place} text-anchor="end">step')
    return "".join(parts) + "</text>"


def _path(style: str, places: Sequence[tuple[float, float]], clip: str) -> str:
    line = "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<path class="{style}" clip-path="url(#{escape(clip)})" d="M{line}"/>'


def _band(band: Band, x: Callable[[float], float], y: Callable[[float], float], clip: str) -> str:
    """The area between the two bounds; the first ones hold from the beginning."""
    steps = [0, *band.steps]
    low, high = ([bounds[0], *bounds] for bounds in (band.low, band.high))
    around = [*zip(steps, high, strict=True), *reversed(list(zip(steps, low, strict=True)))]
    places = "L".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in around)
    title = f"<title>{escape(band.title)}</title>"
    return f'<path class="band" clip-path="url(#{escape(clip)})" d="M{places}Z">{title}</path>'


def _thinned(steps: Floats, values: Floats) -> list[tuple[float, float]]:
    """At most two points per bucket, its lowest and highest, so that no spike is lost."""
    if len(steps) <= _MOST_POINTS:
        return list(zip(steps.tolist(), values.tolist(), strict=True))
    kept: set[int] = {0, len(steps) - 1}
    for bucket in np.array_split(np.arange(len(steps)), _MOST_POINTS // 2):
        kept |= {int(bucket[values[bucket].argmin()]), int(bucket[values[bucket].argmax()])}
    return [(float(steps[index]), float(values[index])) for index in sorted(kept)]


def _clip(value: float) -> float:
    return min(100.0, max(0.0, value))
