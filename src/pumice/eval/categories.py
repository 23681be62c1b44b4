"""Scores by category: as rows of text for tables, and as a section of the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pumice.eval.benchmark import Benchmark
from pumice.eval.scores import Scores

_NO_NAME = "(none)"


def category_rows(scores: Scores) -> list[list[str]]:
    """The titles, and a row for each category: its name, its number of items, its metrics."""
    names = dict.fromkeys(name for own in scores.by_category.values() for name in own)
    names.pop("n", None)
    rows = [["category", "n", *names]]
    # A kind of categories after the other: those of another kind are named "kind=name".
    kinds = sorted(scores.by_category.items(), key=lambda pair: pair[0].rpartition("=")[0])
    for category, own in kinds:
        rows.append(
            [category or _NO_NAME, f"{own['n']:.0f}", *(_number(own.get(name)) for name in names)]
        )
    return rows


def category_section(runs: Sequence[tuple[Benchmark, Scores]]) -> str:
    """A table for each benchmark that has categories; empty when none has."""
    tables = "\n".join(
        _table(benchmark, scores) for benchmark, scores in runs if len(scores.by_category) > 1
    )
    if not tables:
        return ""
    return (
        '<section>\n<h2>By category</h2>\n<p class="lead">The same metrics over parts of a '
        "benchmark. Small parts have wide intervals: n is the number of questions.</p>\n"
        f'<div class="folds">\n{tables}\n</div>\n</section>'
    )


def _table(benchmark: Benchmark, scores: Scores) -> str:
    titles, *rows = category_rows(scores)
    head = "".join(f"<th>{escape(title.replace('_', ' '))}</th>" for title in titles)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<details><summary>{escape(benchmark.title)} <span>{len(rows)} categories</span></summary>"
        f'<div class="scroll"><table class="categories"><thead><tr>{head}</tr></thead><tbody>\n'
        f"{body}\n</tbody></table></div></details>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:,.2f}"
