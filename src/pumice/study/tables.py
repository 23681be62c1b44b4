"""A study's tables: Markdown to read, CSV to go on with, LaTeX for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from pumice.study.analyse import Findings, Metric
from pumice.study.results import ArmResult
from pumice.study.statistics import Estimate, direction

Row = tuple[str, ...]
COST_HEAD = (
    "arm", "image tokens", "parameters", "steps", "tokens trained on", "training FLOPs",
    "training time", "peak memory",
)  # fmt: skip


def metric_rows(findings: Findings, metric: Metric) -> list[Row]:
    """The lines of one metric: arm, mean, difference from the reference, verdict, seeds."""
    rows: list[Row] = []
    for result in findings.arms:
        own = findings.means[result.arm.name].get(str(metric))
        gap = findings.differences[result.arm.name].get(str(metric))
        if own is None:
            failed = "; ".join(f"seed {s}: {e}" for s, e in result.errors.items())
            rows.append((result.arm.name, "-", "-", failed or "not run", ""))
            continue
        rows.append(
            (
                result.arm.name,
                with_interval(own),
                "" if gap is None else with_interval(gap, signed=True),
                findings.verdict(result.arm, metric),
                ", ".join(f"{value:.1f}" for value in own.seeds),
            )
        )
    return rows


def cost_rows(findings: Findings) -> list[Row]:
    """What each arm takes; a dash where no run has finished."""
    return [(result.arm.name, *_cost(result)) for result in findings.arms]


def errors_of(findings: Findings) -> list[str]:
    """Every run that failed or is missing, with its error."""
    return [
        f"{result.arm.name}, seed {seed}: {error}"
        for result in findings.arms
        for seed, error in result.errors.items()
    ]


def markdown(findings: Findings) -> str:
    """The whole study as Markdown."""
    parts = [f"# {findings.study.name}", findings.study.about]
    head = ("arm", "mean (95 %)", f"less {findings.reference.name} (95 %)", "verdict", "seeds")
    for metric in findings.metrics:
        parts += [f"## {metric.title}", markdown_table([head, *metric_rows(findings, metric)])]
    parts += ["## Cost", markdown_table([COST_HEAD, *cost_rows(findings)])]
    if findings.claims:
        parts += ["## Claims", claims_table(findings)]
    if lost := errors_of(findings):
        parts += ["## Runs without a result", "\n".join(f"* {line}" for line in lost)]
    return "\n\n".join(part for part in [*parts, reading(findings)] if part) + "\n"


def headline(findings: Findings) -> str:
    """The study in a sentence: what the first metric says of each arm."""
    metric = findings.metrics[0]
    by_verdict: dict[str, list[str]] = {}
    for result in findings.arms:
        if result.arm != findings.reference:
            by_verdict.setdefault(findings.verdict(result.arm, metric), []).append(result.arm.name)
    parts = [
        f"{word[:1].upper()}{word[1:]}: {_listed(names)}" for word, names in by_verdict.items()
    ]
    beside = f"{metric.title}, beside {findings.reference.name}"
    return f"{beside}. {'. '.join(parts) or 'There is one arm'}."


def _listed(names: Sequence[str]) -> str:
    """Up to four arms by name; a name may hold commas itself."""
    return " / ".join(names) if len(names) <= 4 else f"{len(names)} arms"


def reading(findings: Findings) -> str:
    """How the numbers are to be read."""
    clear, looked = findings.clear()
    seeds = len(findings.study.seeds)
    said = (
        f"Means over {seeds} seeds. Intervals are over other pictures and other seeds at once "
        if seeds > 1
        else "One seed: intervals are over other pictures, and say nothing of other seeds "
    )
    by_chance = f"{looked / 20:.1f}" if looked < 100 else f"{looked / 20:.0f}"
    return (
        f"{said}(docs/study.md). {looked} differences were looked at and {clear} leave out zero; "
        f"about {by_chance} would by chance if nothing mattered."
    )


def claims_table(findings: Findings) -> str:
    """The paper's claims and what became of them."""
    rows = [("claim", "paper", "here: more less (95 %)", "")]
    for judged in findings.claims:
        claim = judged.claim
        gap = "-" if judged.difference is None else with_interval(judged.difference, signed=True)
        rows.append(
            (f"{claim.text} ({claim.source})", claim.paper or "-", f"{claim.metric} {gap}",
             judged.status)
        )  # fmt: skip
    return markdown_table(rows)


def csv_text(findings: Findings) -> str:
    """One line for an arm and a metric, with its costs."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    axes = list(findings.study.axes)
    writer.writerow(
        [*axes, "metric", "mean", "low", "high", "difference", "difference_low",
         "difference_high", "verdict", "seeds", "image_tokens", "parameters", "flops",
         "tokens", "seconds", "memory_bytes"]
    )  # fmt: skip
    for result in findings.arms:
        name, cost = result.arm.name, result.cost
        for metric in findings.metrics:
            own = findings.means[name].get(str(metric))
            gap = findings.differences[name].get(str(metric))
            seeds = "" if own is None else " ".join(map(str, own.seeds))
            writer.writerow(
                [*(level for _, level in result.arm.levels), metric, *_plain(own), *_plain(gap),
                 findings.verdict(result.arm, metric), seeds, cost.image_tokens,
                 cost.parameters, *map(_blank, (cost.flops, cost.tokens, cost.seconds,
                                                cost.memory))]
            )  # fmt: skip
    return file.getvalue()


def latex(findings: Findings) -> str:
    """A table of arms and metrics for booktabs: clear differences are marked."""
    columns = "l" + "r" * (len(findings.metrics) + 1)
    head = " & ".join(["", *(_tex(metric.title) for metric in findings.metrics), "FLOPs"])
    lines = []
    for result in findings.arms:
        cells = [_tex_cell(findings, result, metric) for metric in findings.metrics]
        flops = "--" if result.cost.flops is None else _tex_power(result.cost.flops)
        lines.append(" & ".join([_tex(result.arm.name), *cells, flops]) + r" \\")
    body = "\n".join(lines)
    return (
        f"% {_tex(reading(findings))}\n"
        "% up arrow: better than the reference, down arrow: worse, by the 95 % interval\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; the first is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|" + "---|" * len(rows[0])
    return "\n".join([lines[0], rule, *lines[1:]])


def with_interval(estimate: Estimate, *, signed: bool = False) -> str:
    """ "93.1 (92.0 to 94.2)"; with a sign for differences."""
    return interval_text(estimate.value, estimate.interval, signed=signed)


def interval_text(value: float, interval: Sequence[float] | None, *, signed: bool = False) -> str:
    """The same of plain numbers; the value alone where its interval is not known."""
    sign = "+" if signed else ""
    if interval is None:
        return f"{value:{sign}z.1f}"
    low, high = interval
    # Shares of a word, where one digit would write three equal numbers.
    form = f"{sign}z.{2 if high - low < 0.5 else 1}f"
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def clock(seconds: float) -> str:
    """ "3 min 05 s"; with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _cost(result: ArmResult) -> Row:
    cost = result.cost
    steps = ", ".join(f"{name} {count or 'epochs'}" for name, count in cost.steps.items())
    return (
        f"{cost.image_tokens:,}",
        f"{cost.parameters:,}",
        steps,
        "-" if cost.tokens is None else f"{cost.tokens:,.0f}",
        "-" if cost.flops is None else f"{cost.flops:.2e}",
        "-" if cost.seconds is None else clock(cost.seconds),
        "-" if cost.memory is None else f"{cost.memory / 2**30:.2f} GiB",
    )


def _plain(estimate: Estimate | None) -> list[object]:
    if estimate is None:
        return ["", "", ""]
    return [estimate.value, *(estimate.interval or ("", ""))]


def _blank(value: float | None) -> object:
    return "" if value is None else value


def _tex_cell(findings: Findings, result: ArmResult, metric: Metric) -> str:
    own = findings.means[result.arm.name].get(str(metric))
    if own is None:
        return "--"
    gap = findings.differences[result.arm.name].get(str(metric))
    half = "" if own.interval is None else rf" \pm {(own.interval[1] - own.interval[0]) / 2:.1f}"
    sign = 0 if gap is None else gap.sign * (direction(metric.name) or 1)
    mark = {1: r"^{\uparrow}", -1: r"^{\downarrow}", 0: ""}[sign]
    return f"${own.value:.1f}{half}{mark}$"


def _tex_power(number: float) -> str:
    digits, _, power = f"{number:.1e}".partition("e")
    return rf"${digits} \cdot 10^{{{int(power)}}}$"


def _tex(text: str) -> str:
    for char in "&%$#_{}":
        text = text.replace(char, "\\" + char)
    return text
