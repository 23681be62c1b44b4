"""report.html of a run: its scores beside the blind controls, loss curves, examples and costs."""

from __future__ import annotations

import platform
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pumice
from pumice.core.files import read_jsonl
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.report import Example, ReportData, score_row, write_report
from pumice.recipe.load import resolved_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pumice.eval.scores import Scores
    from pumice.recipe.schema import Recipe
    from pumice.train.stages import StageResult

_EXAMPLES_PER_BENCHMARK = 2
# A graded score from here on is shown as a right answer.
_RIGHT_FROM = 0.5


def report_run(
    recipe: Recipe,
    results: Sequence[StageResult],
    scores: Sequence[Scores],
    shuffled: Sequence[Scores],
    *,
    data: Path,
    out: Path,
    seconds: float,
) -> Path:
    """Write `out`/report.html; `data` holds the benchmarks' files, `seconds` is scoring's time."""
    path = out / "report.html"
    rows = [
        score_row(
            own, BENCHMARKS[own.benchmark].title, BENCHMARKS[own.benchmark].headline, blind=other
        )
        for own, other in zip(scores, shuffled, strict=True)
    ]
    page = ReportData(
        title=f"{recipe.name}: report",
        about=recipe.about,
        scores=rows,
        curves=_curves(out / "metrics.jsonl"),
        examples=[
            example for own in scores for example in _examples(own.benchmark, data, out / "eval")
        ],
        recipe=resolved_yaml(recipe),
        facts=_facts(recipe, results),
        costs=_costs(results, seconds),
        footnotes=[f"{own.benchmark}: {line}" for own in scores for line in own.notes],
    )
    write_report(path, page)
    return path


def _curves(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) points per stage, in the order of training."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    if metrics.is_file():
        for _, row in read_jsonl(metrics, allow_cut_tail=True):
            curves[row["stage"]].append((row["step"], row["loss"]))
    return dict(curves)


def _examples(name: str, data: Path, evaluated: Path) -> list[Example]:
    """A few questions spread evenly over the benchmark, so that nothing is picked by its answer."""
    benchmark = BENCHMARKS[name]
    items = {item.id: item for item in benchmark.load(data)}
    answered = [
        row
        for _, row in read_jsonl(evaluated / name / "predictions.jsonl")
        if row["error"] is None and row["id"] in items
    ]
    count = min(_EXAMPLES_PER_BENCHMARK, len(answered))
    examples = []
    for number in range(count):
        row = answered[(2 * number + 1) * len(answered) // (2 * count)]
        item = items[row["id"]]
        examples.append(
            Example(
                question=item.prompt,
                answer=row["text"],
                truth=benchmark.truth_text(item),
                right=(row["score"] or 0.0) >= _RIGHT_FROM,
                image=None if item.image is None else item.image.read_bytes(),
                benchmark=benchmark.title,
            )
        )
    return examples


def _facts(recipe: Recipe, results: Sequence[StageResult]) -> dict[str, str]:
    model = recipe.model
    return {
        "Model": f"{model.vision} + {model.connector} + {model.language}",
        "Checkpoint": str(results[-1].checkpoint),
        "Seed": str(recipe.seed),
        "Made with": f"pumice {pumice.__version__}, Python {platform.python_version()}",
    }


def _costs(results: Sequence[StageResult], seconds: float) -> list[dict[str, str]]:
    lines: list[dict[str, Any]] = [
        {
            "Part": result.checkpoint.name,
            "Steps": f"{result.steps:,}",
            "Supervised tokens": f"{result.supervised_tokens:,}",
            "Time": _clock(result.seconds),
            "Peak memory": f"{result.peak_memory_bytes / 2**30:.2f} GiB",
        }
        for result in results
    ]
    return [*lines, {"Part": "evaluation", "Time": _clock(seconds)}]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
