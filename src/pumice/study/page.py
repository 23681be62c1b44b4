"""study.html: one self-contained page of a study, to be read and sent by mail."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pumice.eval.charts import COLOURS, REPORT, style_of
from pumice.recipe.yaml_text import dump_yaml
from pumice.study.analyse import OPPOSITE, SHOWN, Findings, Metric
from pumice.study.plots import Plot
from pumice.study.tables import (
    COST_HEAD,
    Row,
    cost_rows,
    errors_of,
    headline,
    metric_rows,
    reading,
    with_interval,
)

_PLOT, _STUDY = ("pumice.study", "plot.css"), ("pumice.study", "study.css")
_BETTER, _WORSE = ("better", "higher"), ("worse", "lower")


def study_page(findings: Findings, plots: Sequence[Plot]) -> str:
    """The whole page; no file and no network is needed to show it."""
    sections = (
        _head(findings),
        _claims(findings),
        *(_metric(findings, metric) for metric in findings.metrics),
        _plots(plots),
        _table("Cost", "Measured on this machine; FLOPs and image tokens are counted from shapes.",
               [COST_HEAD, *cost_rows(findings)]),
        _errors(findings),
        _spec(findings),
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(findings.study.name)}: study</title>\n"
        f"<style>\n{style_of(COLOURS, REPORT, _PLOT, _STUDY)}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(part for part in sections if part)
        + f"\n<footer><p>{escape(reading(findings))}</p><p>Written by pumice.</p></footer>"
        "\n</main>\n</body>\n</html>\n"
    )  # fmt: skip


def plot_file(plot: Plot) -> str:
    """The plot as a file of its own, with its colours inside."""
    start, end = plot.svg.split(">", 1)
    return f"{start}><style>{style_of(COLOURS, _PLOT)}</style>{end}\n"


def _head(findings: Findings) -> str:
    study = findings.study
    facts = {
        "Arms": str(len(findings.arms)),
        "Seeds": ", ".join(map(str, study.seeds)),
        "Reference": findings.reference.name,
        "Equal": study.budget.equal,
        "Base recipe": study.base,
    }
    terms = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    about = f'<p class="about">{escape(study.about)}</p>' if study.about else ""
    return (
        f'<header>\n<p class="kicker">pumice study</p>\n<h1>{escape(study.name)}</h1>\n'
        f'<p class="verdict">{escape(headline(findings))}</p>\n{about}\n'
        f'<dl class="facts">{terms}</dl>\n</header>'
    )


def _claims(findings: Findings) -> str:
    if not findings.claims and not findings.study.not_testable:
        return ""
    lines = []
    for judged in findings.claims:
        claim, gap = judged.claim, judged.difference
        here = f"{claim.metric}, {claim.more} less {claim.less}: "
        here += "-" if gap is None else with_interval(gap, signed=True)
        kind = {SHOWN: "up", OPPOSITE: "down"}.get(judged.status, "none")
        lines.append(
            f'<tr><td>{escape(claim.text)}<span class="from">{escape(claim.source)}</span></td>'
            f"<td>{escape(claim.paper) or '-'}</td>"
            f"<td>{escape(here)}</td>"
            f'<td><span class="word {kind}">{escape(judged.status)}</span></td></tr>'
        )
    body = "\n".join(lines)
    head = "<tr><th>Claim</th><th>Paper</th><th>Here (95 %)</th><th></th></tr>"
    untold = "".join(f"<li>{escape(text)}</li>" for text in findings.study.not_testable)
    return _section(
        "What the paper says",
        "A claim is shown when the whole interval of the difference is on the claimed side.",
        f'<div class="scroll"><table class="claims"><thead>{head}</thead><tbody>\n{body}\n'
        "</tbody></table></div>"
        + (
            f'<p class="lead">Not testable here:</p><ul class="plain">{untold}</ul>'
            if untold
            else ""
        ),
    )


def _metric(findings: Findings, metric: Metric) -> str:
    head = ("arm", "mean (95 %)", f"less {findings.reference.name}", "verdict", "by seed")
    return _table(metric.title, "", [head, *metric_rows(findings, metric)], words=3)


def _table(title: str, lead: str, rows: Sequence[Row], words: int | None = None) -> str:
    """A table; the cells of column `words` are verdicts and get their colour."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = []
    for row in rows[1:]:
        cells = [
            _verdict(cell) if place == words else escape(cell) for place, cell in enumerate(row)
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    body = "\n".join(lines)
    return _section(
        title,
        lead,
        f'<div class="scroll"><table class="arms"><thead><tr>{head}</tr></thead><tbody>\n{body}\n'
        "</tbody></table></div>",
    )


def _verdict(words: str) -> str:
    kind = "up" if words.startswith(_BETTER) else "down" if words.startswith(_WORSE) else "none"
    return f'<span class="word {kind}">{escape(words)}</span>'


def _plots(plots: Sequence[Plot]) -> str:
    if not plots:
        return ""
    figures = "".join(
        f"<figure><figcaption>{escape(plot.title)}</figcaption>{plot.svg}</figure>"
        for plot in plots
    )
    return _section(
        "Plots",
        "Dots are means, bars their 95 % intervals; in effects, grey bars hold zero.",
        f'<div class="plots">{figures}</div>',
    )


def _errors(findings: Findings) -> str:
    lost = errors_of(findings)
    if not lost:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in lost)
    return _section("Runs without a result", "", f'<ul class="plain">{lines}</ul>')


def _spec(findings: Findings) -> str:
    text = dump_yaml(findings.study.model_dump(exclude_defaults=True))
    return _section(
        "Study file",
        "All runs follow from it.",
        f"<details><summary>{escape(findings.study.name)}.yaml</summary>\n"
        f"<pre>{escape(text)}</pre></details>",
    )


def _section(title: str, lead: str, body: str) -> str:
    leading = f'<p class="lead">{escape(lead)}</p>\n' if lead else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{leading}{body}\n</section>"
