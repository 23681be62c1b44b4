"""report.html of `pumice eval`: the scores, published ones beside them, and the predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pumice.eval.benchmark import Benchmark
from pumice.eval.browser import browse
from pumice.eval.categories import category_section
from pumice.eval.published import published_section
from pumice.eval.report import ReportData, score_row, write_report
from pumice.eval.scores import Scores


def report_eval(model: str, runs: Sequence[tuple[Benchmark, Path, Scores]], out: Path) -> Path:
    """Writes `out`/report.html of benchmarks with the directories they were run in."""
    path = out / "report.html"
    scores = [own for _, _, own in runs]
    controls = {own.protocol.get("control") for own in scores} - {None}
    page = ReportData(
        title=model,
        about="".join(
            f"A control: asked with {name} images." for name in sorted(map(str, controls))
        ),
        scores=[
            score_row(own, bench.title, bench.headline, most=bench.most) for bench, _, own in runs
        ],
        published="" if controls else published_section(scores),
        categories=category_section([(bench, own) for bench, _, own in runs]),
        browser=browse(runs),
        footnotes=[f"{own.benchmark}: {line}" for own in scores for line in own.notes],
    )
    write_report(path, page)
    return path
