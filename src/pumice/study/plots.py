"""A study's plots as SVG: colours come from the page's style, or from one inside a file.

Every plot shows means with their 95 % intervals; nothing is drawn of a run that has no result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pumice.eval.charts import nice_ticks
from pumice.study.analyse import Findings, Metric
from pumice.study.results import LONGEST, ArmResult
from pumice.study.statistics import Estimate, direction

_WIDTH, _LEFT, _RIGHT = 640, 64, 20
_HEIGHT, _TOP, _BOTTOM = 340, 26, 52
_ROW = 30
# A letter of 13 px, wide as letters are on the average, and a line of them.
_LETTER, _LINE = 7.0, 16
# Colours of lines, by class in plot.css.
_KINDS = 6
Place = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot with what it is called, in words and as a file."""

    title: str
    name: str
    svg: str


def all_plots(findings: Findings) -> list[Plot]:
    """Every plot that the study's results allow, in the order of the page."""
    study = findings.study
    plots = []
    for axis in study.axes:
        for metric in findings.metrics:
            plots.append(effect_plot(findings, axis, metric))
    quality = [metric for metric in findings.metrics if direction(metric.name) > 0]
    if quality:
        plots.append(pareto_plot(findings, quality[0]))
    pairs = [(axis, str(metric)) for axis in study.axes for metric in findings.metrics
             if study.axes[axis].numbers()]  # fmt: skip
    pairs += [(axis, metric) for axis, metric in study.against if (axis, metric) not in pairs]
    known = {str(metric): metric for metric in findings.metrics}
    plots += [level_plot(findings, axis, known[text]) for axis, text in pairs if text in known]
    plots += [length_plot(findings, benchmark) for benchmark in study.lengths]
    return [plot for plot in plots if plot is not None]


def effect_plot(findings: Findings, axis: str, metric: Metric) -> Plot | None:
    """What each level of an axis changes, the others at their reference; None without results."""
    levels = findings.study.reference_levels()
    rows: list[tuple[str, Estimate]] = []
    for level in findings.study.axes[axis].levels():
        result = _arm(findings, {**levels, axis: level})
        if result is None or result.arm == findings.reference:
            continue
        gap = findings.differences[result.arm.name].get(str(metric))
        if gap is not None and gap.interval is not None:
            rows.append((level, gap))
    if not rows:
        return None
    label = 8.0 * max(len(name) for name, _ in rows) + 16
    low, high = _range([value for _, gap in rows for value in _ends(gap)] + [0.0])
    x = _scale(low, high, label, _WIDTH - _RIGHT)
    height = _TOP + _ROW * len(rows) + _BOTTOM - 10
    base = _TOP + _ROW * len(rows)
    parts = _x_axis(nice_ticks(low, high, 6), x, base, f"{metric.title}, difference", top=_TOP - 8)
    parts.append(
        f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{_TOP - 8}" y2="{base}"/>'
    )
    for place, (name, gap) in enumerate(rows):
        y = _TOP + _ROW * place + _ROW / 2
        text = f'<text x="{label - 10:.0f}" y="{y:.1f}" dy=".34em" text-anchor="end">'
        parts.append(f"{text}{escape(name)}</text>")
        parts.append(_interval_mark(gap, x, y, "clear" if gap.sign else "unclear"))
    title = f"{axis}: {metric.title} beside {findings.reference.name}"
    return Plot(title, f"effect-{slug(axis)}-{slug(str(metric))}", _svg(parts, height, title))


def pareto_plot(findings: Findings, metric: Metric) -> Plot | None:
    """A metric (more is better) against the FLOPs of training; arms that none beats are joined."""
    points = [
        (result.arm.name, result.cost.flops, own)
        for result in findings.arms
        if result.cost.flops
        and (own := findings.means[result.arm.name].get(str(metric))) is not None
        and own.interval is not None
    ]
    if len({flops for _, flops, _ in points}) < 2:
        # Arms of one cost have nothing to trade.
        return None
    costs = [math.log10(flops) for _, flops, _ in points]
    y, parts = _y_axis([value for *_, own in points for value in _ends(own)], metric.title)
    margin = max(0.06 * (max(costs) - min(costs)), 0.02)
    low, high = min(costs) - margin, max(costs) + 4 * margin
    x = _scale(low, high, _LEFT, _WIDTH - _RIGHT)
    labels = [(10**tick, x(tick)) for tick in nice_ticks(low, high, 4)]
    parts += _named_ticks(
        [(f"{value:.1e}", at) for value, at in labels], "training FLOPs, log scale"
    )
    front = pareto_front([(flops, own.value) for _, flops, own in points])
    line = "L".join(f"{x(costs[i]):.1f},{y(points[i][2].value):.1f}" for i in front)
    parts.append(f'<path class="front" d="M{line}"/>')
    for place, (_, _, own) in enumerate(points):
        parts.append(_bar(own, x(costs[place]), y, "clear" if place in front else "unclear"))
    heights = apart([y(own.value) - 7 for *_, own in points], 14.0)
    for at, height, (name, *_) in zip(map(x, costs), heights, points, strict=True):
        # Names of dear arms stand at the left of their dots, or they would leave the picture.
        anchor, shift = ("end", -9) if at > 0.6 * _WIDTH else ("start", 9)
        spot = f'x="{at + shift:.1f}" y="{height:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="label" {spot}>{escape(name)}</text>')
    title = f"{metric.title} against the cost of training"
    return Plot(title, f"cost-{slug(str(metric))}", _svg(parts, _HEIGHT, title))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of (cost, quality) that no other beats in both, from cheap to dear."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved down where two are nearer than `gap`, so that no name hides another."""
    moved, last = list(heights), -math.inf
    for place in sorted(range(len(moved)), key=moved.__getitem__):
        last = moved[place] = max(moved[place], last + gap)
    return moved


def level_plot(findings: Findings, axis: str, metric: Metric) -> Plot | None:
    """A metric along an axis, a line for each combination of the others."""
    names = list(findings.study.axes[axis].levels())
    numbers = findings.study.axes[axis].numbers()
    at = numbers or [float(place) for place in range(len(names))]
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for result in findings.arms:
        levels = dict(result.arm.levels)
        own = findings.means[result.arm.name].get(str(metric))
        if own is None or own.interval is None:
            continue
        rest = ", ".join(f"{k} {v}" for k, v in levels.items() if k != axis)
        lines.setdefault(rest, []).append((at[names.index(levels[axis])], own))
    if not lines:
        return None
    ends = [value for line in lines.values() for _, own in line for value in _ends(own)]
    y, parts = _y_axis(ends, metric.title)
    low, high = _range(at)
    x = _scale(low, high, _LEFT, _WIDTH - _RIGHT)
    unit = findings.study.axes[axis].unit
    title_x = f"{axis}, {unit}" if unit else axis
    shown = [f"{number:g}" for number in at] if numbers else names
    ticks = [(text, x(value)) for text, value in zip(shown, at, strict=True)]
    parts += _named_ticks(ticks, title_x)
    below = _HEIGHT + _LINE * (_tick_lines(ticks) - 1)
    for kind, (name, line) in enumerate(sorted(lines.items())):
        line.sort(key=lambda point: point[0])
        style = f"line-{kind % _KINDS}"
        path = "L".join(f"{x(place):.1f},{y(own.value):.1f}" for place, own in line)
        parts.append(f'<path class="series {style}" d="M{path}"/>')
        # A few pixels apart, so that intervals of different lines do not hide each other.
        shift = 5.0 * (kind - (len(lines) - 1) / 2)
        parts += [_bar(own, x(place) + shift, y, style) for place, own in line]
        if len(lines) > 1:
            foot = f'x="{_LEFT}" y="{below + 10 + 17 * kind}"'
            parts.append(f'<text class="label {style}" {foot}>{escape(name)}</text>')
    title = f"{metric.title} by {axis}"
    height = below + (17 * len(lines) if len(lines) > 1 else 0)
    return Plot(title, f"level-{slug(axis)}-{slug(str(metric))}", _svg(parts, height, title))


def length_plot(findings: Findings, benchmark: str) -> Plot | None:
    """How many words the answers have, one histogram an arm, on one scale."""
    arms = [result for result in findings.arms if result.lengths.get(benchmark)]
    if not arms:
        return None
    longest = max(max(result.lengths[benchmark]) for result in arms)
    high = max(_share(result.lengths[benchmark]) for result in arms)
    strip = 62
    height = _TOP + strip * len(arms) + _BOTTOM - 8
    label = 8.0 * max(len(result.arm.name) for result in arms) + 16
    label = min(label, 300.0)
    x = _scale(-0.5, longest + 0.5, label, _WIDTH - _RIGHT)
    ticks = [tick for tick in nice_ticks(0, max(longest, 1), 8) if tick == int(tick)]
    base = _TOP + strip * len(arms)
    words = "words in an answer" + (
        f" ({LONGEST} and more at the end)" if longest == LONGEST else ""
    )
    parts = _x_axis(ticks, x, base, f"{words}, all seeds", top=_TOP)
    for place, result in enumerate(arms):
        foot = _TOP + strip * (place + 1)
        counts = result.lengths[benchmark]
        parts.append(
            f'<text x="{label - 10:.0f}" y="{foot - 18}" text-anchor="end">'
            f"{escape(result.arm.name)}</text>"
        )
        total, width = sum(counts.values()), x(1) - x(0)
        for length, count in sorted(counts.items()):
            tall = (strip - 12) * count / total / high
            parts.append(
                f'<rect class="bin" x="{x(length - 0.5) + 0.5:.1f}" y="{foot - tall:.1f}" '
                f'width="{max(width - 1, 0.5):.1f}" height="{tall:.1f}"/>'
            )
        parts.append(
            f'<line class="axis" x1="{label}" x2="{_WIDTH - _RIGHT}" y1="{foot}" y2="{foot}"/>'
        )
    title = f"Answer lengths, {Metric(benchmark, '').title.strip()}"
    return Plot(title, f"lengths-{slug(benchmark)}", _svg(parts, height, title))


def _share(counts: Counter[int]) -> float:
    return max(counts.values()) / sum(counts.values())


def _arm(findings: Findings, levels: dict[str, str]) -> ArmResult | None:
    return next((r for r in findings.arms if dict(r.arm.levels) == levels), None)


def _ends(estimate: Estimate) -> list[float]:
    return [estimate.value, *(estimate.interval or ())]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values with a margin; never empty."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(abs(low) * 0.05, 0.5)
    return low - margin, high + margin


def _scale(low: float, high: float, start: float, end: float) -> Place:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _y_axis(values: Sequence[float], title: str) -> tuple[Place, list[str]]:
    low, high = _range(values)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<text class="name" x="{_LEFT - 44}" y="{_TOP - 11}">{escape(title)}</text>']
    for tick in nice_ticks(low, high, 5):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text x="{_LEFT - 10}" y="{y(tick):.1f}" dy=".34em" '
            f'text-anchor="end">{tick:g}</text>'
        )
    return y, parts


def _named_ticks(ticks: Sequence[tuple[str, float]], title: str) -> list[str]:
    base = _HEIGHT - _BOTTOM + 4
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>']
    lines = _tick_lines(ticks)
    for place, (text, at) in enumerate(ticks):
        half = _LETTER * len(text) / 2
        middle = min(max(at, half), _WIDTH - half)
        spot = f'x="{middle:.1f}" y="{base + 18 + _LINE * (place % lines)}" text-anchor="middle"'
        parts.append(f"<text {spot}>{escape(text)}</text>")
    end = f'x="{_WIDTH - _RIGHT}" y="{base + 38 + _LINE * (lines - 1)}" text-anchor="end"'
    return [*parts, f'<text class="name" {end}>{escape(title)}</text>']


def _tick_lines(ticks: Sequence[tuple[str, float]]) -> int:
    """On how many lines, in turn, the names below an axis do not touch."""
    widths = [_LETTER * (len(text) + 1) for text, _ in ticks]
    for lines in range(1, len(ticks)):
        pairs = range(len(ticks) - lines)
        if all(
            abs(ticks[i + lines][1] - ticks[i][1]) >= (widths[i] + widths[i + lines]) / 2
            for i in pairs
        ):
            return lines
    return max(len(ticks), 1)


def _x_axis(ticks: Sequence[float], x: Place, base: float, title: str, *, top: float) -> list[str]:
    parts = []
    for tick in ticks:
        at = f"{x(tick):.1f}"
        parts.append(
            f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{base}"/>'
            f'<text x="{at}" y="{base + 20}" text-anchor="middle">{tick:g}</text>'
        )
    end = f'x="{_WIDTH - _RIGHT}" y="{base + 40}" text-anchor="end"'
    return [*parts, f'<text class="name" {end}>{escape(title)}</text>']


def _interval_mark(estimate: Estimate, x: Place, y: float, kind: str) -> str:
    """A lying interval with its value."""
    low, high = estimate.interval or (estimate.value, estimate.value)
    return (
        f'<line class="bar {kind}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<circle class="dot {kind}" cx="{x(estimate.value):.1f}" cy="{y:.1f}" r="4.5"/>'
    )


def _bar(estimate: Estimate, at: float, y: Place, kind: str) -> str:
    """A standing interval with its value."""
    low, high = estimate.interval or (estimate.value, estimate.value)
    ends = f'x1="{at:.1f}" x2="{at:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"'
    return (
        f'<line class="bar {kind}" {ends}/>'
        f'<circle class="dot {kind}" cx="{at:.1f}" cy="{y(estimate.value):.1f}" r="4.5"/>'
    )


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def slug(text: str) -> str:
    """A name as it stands in a file's name."""
    return "".join(char if char.isalnum() else "-" for char in text.lower())
