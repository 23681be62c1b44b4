"""One benchmark's scores of several models as an inline SVG: a line a model, the best on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pumice.eval.charts import nice_ticks

# User units; the page scales the picture to its column, about as wide as this on any screen.
_WIDTH, _LINE = 336, 20
_LEFT, _RIGHT, _TOP, _BOTTOM = 136, 280, 6, 22
# So much of the range stays free at both ends, for whole marks.
_AIR = 0.07


@dataclass(frozen=True, slots=True)
class Dot:
    """A model's score. `own` is the one the page is about; `other`: it was asked other questions,
    so it can not be compared and its mark is hollow.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    own: bool = False
    other: bool = False


def dot_plot(dots: Sequence[Dot], title: str) -> str:
    """The SVG; the axis holds all scores and the interval, and begins anywhere."""
    ranked = sorted(dots, key=lambda dot: -dot.value)
    ends = [dot.value for dot in dots] + [end for dot in dots for end in dot.interval or ()]
    low, high = min(ends), max(ends)
    air = _AIR * (high - low) or 1.0
    low, high = low - air, high + air

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (value - low) / (high - low)

    base = _TOP + _LINE * len(ranked)
    parts = [_tick(x(tick), base, f"{tick:g}") for tick in nice_ticks(low, high, 4)]
    parts += [_line(dot, x, _TOP + _LINE * (row + 0.5)) for row, dot in enumerate(ranked)]
    label = ", ".join(f"{dot.name} {dot.value:.1f}" for dot in ranked)
    return (
        f'<svg class="dots" viewBox="0 0 {_WIDTH} {base + _BOTTOM}" role="img" '
        f'aria-label="{escape(f"{title}: {label}")}">{"".join(parts)}</svg>'
    )


def _tick(at: float, base: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{base}"/>'
        f'<text class="tick" x="{at:.1f}" y="{base + 15}" text-anchor="middle">{text}</text>'
    )


def _line(dot: Dot, x: Callable[[float], float], y: float) -> str:
    style = "own" if dot.own else "published"
    style += " other" if dot.other else ""
    marks = [
        f'<text x="{end}" y="{y:.1f}" dy=".34em" text-anchor="end">{text}</text>'
        for end, text in ((_LEFT - 12, escape(dot.name)), (_WIDTH, f"{dot.value:,.1f}"))
    ]
    if dot.interval is not None:
        ends = " ".join(
            f'x{number}="{x(end):.1f}"' for number, end in enumerate(dot.interval, start=1)
        )
        marks.append(f'<line class="interval" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
    radius = 5 if dot.own else 4
    marks.append(f'<circle cx="{x(dot.value):.1f}" cy="{y:.1f}" r="{radius}"/>')
    return f'<g class="{style}">{"".join(marks)}</g>'
