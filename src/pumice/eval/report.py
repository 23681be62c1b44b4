"""report.html: one self-contained page on a run, to be read in a minute and sent by mail.

No outside files: the charts are inline SVG, the images are inside the page, and the only script is
the browser of predictions, where there is one.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from pumice.core.files import write_atomic
from pumice.core.images import open_image
from pumice.eval.browser import Browser, script_hash
from pumice.eval.charts import (
    COLOURS,
    REPORT,
    Band,
    Point,
    interval_axis,
    interval_plot,
    loss_figures,
    style_of,
)
from pumice.eval.metrics import Metrics
from pumice.eval.scores import Scores
from pumice.eval.yaml_colours import yaml_line

# Pictures in the page are at most this wide and high; twice what a card shows, for sharp screens.
PICTURE_SIZE = 520
# Smaller pictures are enlarged with hard pixels, since blurring would hide what the model saw.
SMALL_PICTURE = 128
# Longer answers are sentences and are not set in bold.
LONG_ANSWER = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One line of the score table; `value` None when withheld.

    Values are in percent, or of as many points as `most` says (MME: 2,000).
    """

    title: str
    metric: str
    value: float | None
    interval: tuple[float, float] | None = None
    base_rate: float | None = None
    blind: float | None = None
    n: int = 0
    unparsed: int = 0
    errors: int = 0
    missing: int = 0
    note: str = ""
    most: float = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One held-out question; `image` holds an image file's bytes, None for a text question."""

    question: str
    answer: str
    truth: str
    right: bool
    image: bytes | None = None
    benchmark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How one held-out image is cut into tiles: the drawing, an image file's bytes, in words."""

    drawing: bytes
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything on the page. What is empty is left out of it.

    `verdict` "" means: write it from the scores. `curves` maps a stage to its (step, loss) points,
    in the order of the stages, `bands` to where healthy runs lie. `facts` stand under the verdict.
    `costs` are the lines of the time and memory table; the keys of the first are the columns.
    """

    title: str
    scores: Sequence[ScoreRow]
    verdict: str = ""
    about: str = ""
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    bands: Mapping[str, Band] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    tiling: Tiling | None = None
    recipe: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    costs: Sequence[Mapping[str, str]] = ()
    published: str = ""
    categories: str = ""
    browser: Browser | None = None
    footnotes: Sequence[str] = ()


def score_row(
    scores: Scores,
    title: str,
    metric: str,
    *,
    blind: Scores | None = None,
    most: float = 100.0,
) -> ScoreRow:
    """The table line of one benchmark; `blind` are the scores of the shuffled-image control."""

    def pick(metrics: Metrics | None) -> float | None:
        return None if metrics is None else metrics.get(metric)

    return ScoreRow(
        title=f"{title} ({scores.judge['name']})" if scores.judge else title,
        metric=metric.replace("_", " "),
        value=pick(scores.metrics),
        interval=scores.interval.get(metric),
        base_rate=pick(scores.base_rate),
        blind=None if blind is None else pick(blind.metrics),
        n=scores.n,
        unparsed=scores.unparsed,
        errors=scores.errors,
        missing=scores.missing,
        note=scores.caution,
        most=most,
    )


def write_report(path: Path, data: ReportData) -> None:
    """Writes the page."""
    style = style_of(COLOURS, REPORT)
    sections = (
        _head(data),
        _score_table(data.scores),
        data.published,
        data.categories,
        _curves(data.curves, data.bands),
        _examples(data.examples),
        "" if data.browser is None else data.browser.section(),
        _tiling(data.tiling),
        _costs(data.costs),
        _recipe(data.recipe),
        _footer(data),
    )
    scripts = "" if data.browser is None else f"; script-src {script_hash()}"
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'{scripts}\">\n"
        f"<title>{escape(data.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_atomic(path, page)


def verdict(scores: Sequence[ScoreRow]) -> str:
    """One sentence: does the model use its images, and the main numbers."""
    if not scores:
        return "The run asked for no evaluation."
    told = [row for row in scores if row.value is not None]
    if not told:
        return "No benchmark has a score to quote."
    above = [row for row in told if _clearly_above(row)]
    if len(above) == len(told):
        opening = "The model uses what it sees on every benchmark"
    elif not above:
        opening = "On no benchmark is the model clearly better than one that does not look"
    else:
        opening = f"The model uses what it sees on {len(above)} of {len(told)} benchmarks"
    numbers = ", ".join(f"{row.title} {row.value:.1f}{_against(row)}" for row in told)
    absent = [row.title for row in scores if row.value is None]
    ending = f" No score is given for {' and '.join(absent)}." if absent else ""
    return f"{opening}: {numbers}.{ending}"


def _clearly_above(row: ScoreRow) -> bool:
    low = row.interval[0] if row.interval else row.value
    bar = _bar(row)
    return low is not None and bar is not None and low > bar


def _against(row: ScoreRow) -> str:
    bar = _bar(row)
    return "" if bar is None else f" (blind {bar:.1f})"


def _bar(row: ScoreRow) -> float | None:
    """The better of the two answers without looking."""
    bars = [bar for bar in (row.base_rate, row.blind) if bar is not None]
    return max(bars) if bars else None


def _head(data: ReportData) -> str:
    about = f'<p class="about">{_folding(data.about)}</p>' if data.about else ""
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_folding(value)}</dd></div>"
        for name, value in data.facts.items()
    )
    return (
        f'<header>\n<p class="kicker">pumice report</p>\n<h1>{_folding(data.title)}</h1>\n'
        f'<p class="verdict">{escape(data.verdict or verdict(data.scores))}</p>\n{about}'
        + (f'\n<dl class="facts">{facts}</dl>' if facts else "")
        + "\n</header>"
    )


def _folding(text: str) -> str:
    """Escaped; on a phone a path is broken behind its signs, not within a word."""
    return re.sub("([/_])", r"\1<wbr>", escape(text))


def _section(title: str, lead: str, body: str) -> str:
    return f'<section>\n<h2>{title}</h2>\n<p class="lead">{lead}</p>\n{body}\n</section>'


def _score_table(scores: Sequence[ScoreRow]) -> str:
    if not scores:
        return ""
    head = (
        '<thead><tr><th>Benchmark</th><th class="num">Score</th>'
        f'<th class="plot">{interval_axis()}</th><th class="num">Base rate</th>'
        '<th class="num">Other image</th></tr></thead>'
    )
    rows = "\n".join(map(_score_line, scores))
    table = f'<table class="scores">\n{head}\n<tbody>\n{rows}\n</tbody>\n</table>'
    return _section(
        "Scores",
        "In percent, with 95 % intervals from drawing the images anew. A score says something "
        "about seeing only where it stands clear of both blind marks.",
        table + _LEGEND,
    )


def _on_the_axis(
    row: ScoreRow,
) -> tuple[float | None, tuple[float, float] | None, float | None, float | None]:
    """Value, interval, base rate and other image as parts of a hundred."""
    part = 100 / row.most
    value, base, blind = (
        None if number is None else number * part
        for number in (row.value, row.base_rate, row.blind)
    )
    interval = row.interval and (row.interval[0] * part, row.interval[1] * part)
    return value, interval, base, blind


def _score_line(row: ScoreRow) -> str:
    of = "" if row.most == 100 else f" of {row.most:,.0f}"
    small = f"{escape(row.metric)}{of}, n = {row.n:,}"
    for name in ("unparsed", "errors", "missing"):
        if count := getattr(row, name):
            small += f", {count:,} {name}"
    if row.value is None:
        score = '<span class="withheld">withheld</span>'
    elif row.interval is None:
        score = f"<b>{row.value:.1f}</b>"
    else:
        low, high = row.interval
        score = f"<b>{row.value:.1f}</b><span>{low:.1f} to {high:.1f}</span>"
    note = f'<span class="note">{escape(row.note)}</span>' if row.note else ""
    plot = interval_plot(*_on_the_axis(row))
    return (
        f'<tr><td class="bench"><strong>{escape(row.title)}</strong><span>{small}</span>{note}</td>'
        f'<td class="num">{score}</td><td class="plot">{plot}</td>'
        f'<td class="num side" data-name="Base rate">{_number(row.base_rate)}</td>'
        f'<td class="num side" data-name="Other image">{_number(row.blind)}</td></tr>'
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


_LEGEND = """
<ul class="legend">
<li><svg class="strip" width="30" height="18"><line class="interval" x1="6" x2="24" y1="9" y2="9"/>
<circle class="score" cx="15" cy="9" r="5.5"/></svg>score and interval</li>
<li><svg class="strip" width="30" height="18"><line class="base" x1="15" x2="15" y1="1" y2="17"/>
</svg>base rate: the most frequent answer</li>
<li><svg class="strip" width="30" height="18"><circle class="blind" cx="15" cy="9" r="4.5"/>
</svg>other image: the same model, shown the wrong picture</li>
</ul>"""


def _curves(curves: Mapping[str, Sequence[Point]], bands: Mapping[str, Band]) -> str:
    figures = loss_figures(curves, bands)
    if not figures:
        return ""
    return _section(
        "Training",
        "Loss per supervised token over the optimiser steps of each stage; faint the single steps, "
        "bold their running mean.",
        f'<div class="curves">{"".join(figures)}</div>',
    )


_ICON = '<svg viewBox="0 0 16 16" role="img" aria-label="{name}"><path d="{path}"/></svg>'
_RIGHT = _ICON.format(name="right", path="M2.5 8.5 6.3 12.2 13.5 4")
_WRONG = _ICON.format(name="wrong", path="M3.5 3.5l9 9M12.5 3.5l-9 9")


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    right = sum(example.right for example in examples)
    cards = "\n".join(map(_card, examples))
    return _section(
        "Held-out images",
        f"{len(examples)} questions about images that training never saw; {right} answered right.",
        f'<div class="examples">\n{cards}\n</div>',
    )


def _card(example: Example) -> str:
    style, icon = ("right", _RIGHT) if example.right else ("wrong", _WRONG)
    answer = escape(example.answer) or "(empty)"
    if len(example.answer) > LONG_ANSWER:
        style += " long"
    return (
        f'<figure class="card"><div class="picture">{_picture(example)}</div><div class="words">'
        f'<span class="from">{escape(example.benchmark)}</span>'
        f'<p class="question">{escape(example.question)}</p>'
        f'<div class="answer {style}">{icon}<div>{answer}'
        f'<span class="truth">truth: {escape(example.truth)}</span></div></div></div></figure>'
    )


def _picture(example: Example) -> str:
    if example.image is None:
        return "<span>no image</span>"
    image = open_image(example.image, where=f"report example {example.question!r}")
    image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    small = max(image.size) <= SMALL_PICTURE
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=86)
    kind = "png" if small else "jpeg"
    code = base64.b64encode(buffer.getvalue()).decode("ascii")
    style = ' class="small"' if small else ""
    return f'<img{style} alt="" src="data:image/{kind};base64,{code}">'


def _tiling(tiling: Tiling | None) -> str:
    if tiling is None:
        return ""
    code = base64.b64encode(tiling.drawing).decode("ascii")
    return _section(
        "Tiles",
        f"How the model sees one of these images: {escape(tiling.words)}",
        f'<img class="tiles" alt="The image cut into tiles" src="data:image/png;base64,{code}">',
    )


def _costs(costs: Sequence[Mapping[str, str]]) -> str:
    if not costs:
        return ""
    columns = list(costs[0])
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    cells = (
        "".join(f"<td>{escape(line.get(name, ''))}</td>" for name in columns) for line in costs
    )
    body = "\n".join(f"<tr>{line}</tr>" for line in cells)
    return _section(
        "Time and memory",
        "What each part of the run took on this machine.",
        f'<div class="scroll"><table class="costs"><thead><tr>{head}</tr></thead><tbody>\n{body}\n'
        f"</tbody></table></div>",
    )


def _recipe(recipe: str) -> str:
    if not recipe:
        return ""
    body = "\n".join(yaml_line(line) for line in recipe.rstrip().splitlines())
    return _section(
        "Recipe",
        "Every choice of the run; the same file runs it again.",
        f"<details><summary>recipe.yaml</summary>\n<pre>{body}</pre></details>",
    )


def _footer(data: ReportData) -> str:
    notes = "".join(f"<p>{_folding(note)}</p>" for note in data.footnotes)
    return f"<footer>{notes}<p>Written by pumice.</p></footer>"
