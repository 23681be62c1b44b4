"""Scores as a table for people: one row per metric, with its interval and its base rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pumice.cli.output import table

if TYPE_CHECKING:
    from pumice.eval.compare import Comparison, Difference
    from pumice.eval.scores import Scores


def score_table(all_scores: Sequence[Scores], shuffled: Sequence[Scores] = ()) -> str:
    """One row per metric of each benchmark; a withheld score is said to be withheld.

    `shuffled` are the scores of the shuffled-image control, for a column beside the base rate.
    """
    other = {scores.benchmark: scores.metrics or {} for scores in shuffled}
    titles = ["benchmark", "metric", "value", "95 % interval", "base rate"]
    titles += ["n", "unparsed", "missing", "errors"]
    rows = [[*titles, "other image"] if other else titles]
    for scores in all_scores:
        counts = [str(c) for c in (scores.n, scores.unparsed, scores.missing, scores.errors)]
        if scores.metrics is None:
            empty = [scores.label, "withheld", "-", "-", "-", *counts]
            rows.append([*empty, "-"] if other else empty)
            continue
        for name, value in scores.metrics.items():
            pair = scores.interval.get(name)
            interval = f"{_number(pair[0])} .. {_number(pair[1])}" if pair else "-"
            base = _number(scores.base_rate.get(name))
            row = [scores.label, name, _number(value), interval, base, *counts]
            if other:
                row.append(_number(other.get(scores.benchmark, {}).get(name)))
            rows.append(row)
    return table(rows)


def category_tables(all_scores: Sequence[Scores]) -> str:
    """A table for each benchmark that has a score: its categories, their metrics and sizes."""
    from pumice.eval.categories import category_rows

    return "\n".join(
        f"\n{scores.label}\n{table(category_rows(scores))}"
        for scores in all_scores
        if scores.by_category
    )


def comparison_table(found: Sequence[Comparison]) -> str:
    """One row per metric: both scores, B - A with its interval, and on how many items each won."""
    rows = [
        ["benchmark", "metric", "A", "B", "B - A", "95 % interval", "n", "images", "A won", "B won"]
    ]
    for one in found:
        counts = [str(count) for count in (one.n, one.groups, one.a_better, one.b_better)]
        for name, metric in one.metrics.items():
            rows.append([one.name, name, *_gap(metric), *counts])
    return f"{table(rows)}\n* zero lies outside the interval"


def comparison_categories(found: Sequence[Comparison]) -> str:
    """A table for each benchmark: the first metric of every category, as in the whole."""
    titles = ["category", "metric", "A", "B", "B - A", "95 % interval"]
    tables = []
    for one in found:
        rows = [
            [category or "(none)", name, *_gap(metrics[name])]
            for category, metrics in one.by_category.items()
            for name in list(metrics)[:1]
        ]
        if rows:
            tables.append(f"\n{one.name}\n{table([titles, *rows])}")
    return "\n".join(tables)


def _gap(metric: Difference) -> list[str]:
    """Both values, B - A (marked where it is clear), and its interval."""
    pair = metric.interval
    interval = f"{pair[0]:+.2f} .. {pair[1]:+.2f}" if pair else "-"
    gap = f"{metric.difference:+.2f}{' *' if metric.clear else ''}"
    return [_number(metric.a), _number(metric.b), gap, interval]


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"
