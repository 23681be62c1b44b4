"""Scores as a table for people: one row per metric, with its interval and its base rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pumice.cli.output import table

if TYPE_CHECKING:
    from pumice.eval.scores import Scores


def score_table(all_scores: Sequence[Scores], shuffled: Sequence[Scores] = ()) -> str:
    """One row per metric of each benchmark; a withheld score is said to be withheld.

    `shuffled` are the scores of the shuffled-image control, for a column beside the base rate.
    """
    other = {scores.benchmark: scores.metrics or {} for scores in shuffled}
    titles = ["benchmark", "metric", "value", "95 % interval", "base rate", "n", "unparsed"]
    rows = [[*titles, "other image"] if other else titles]
    for scores in all_scores:
        counts = (str(scores.n), str(scores.unparsed))
        if scores.metrics is None:
            empty = [scores.benchmark, "withheld", "-", "-", "-", *counts]
            rows.append([*empty, "-"] if other else empty)
            continue
        for name, value in scores.metrics.items():
            pair = scores.interval.get(name)
            interval = f"{_number(pair[0])} .. {_number(pair[1])}" if pair else "-"
            base = _number(scores.base_rate.get(name))
            row = [scores.benchmark, name, _number(value), interval, base, *counts]
            if other:
                row.append(_number(other.get(scores.benchmark, {}).get(name)))
            rows.append(row)
    return table(rows)


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"
