"""report.html of a run: its scores beside the blind controls, loss curves, examples and costs."""

from __future__ import annotations

import platform
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pumice
from pumice.core.files import read_jsonl
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.examples import pick_examples
from pumice.eval.report import Example, ReportData, score_row, write_report
from pumice.recipe.load import resolved_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pumice.eval.scores import Scores
    from pumice.recipe.schema import Recipe
    from pumice.train.stages import StageResult

_EXAMPLES = 12


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
        examples=_examples(scores, data, out / "eval", recipe.seed),
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


def _examples(scores: Sequence[Scores], data: Path, evaluated: Path, seed: int) -> list[Example]:
    """Twelve answered questions, shared out between the benchmarks and drawn by chance."""
    examples: list[Example] = []
    for place, own in enumerate(scores):
        left = len(scores) - place
        # Another draw for each benchmark, or they would all show the same pictures.
        examples += pick_examples(
            BENCHMARKS[own.benchmark],
            data,
            evaluated / own.benchmark,
            -(-(_EXAMPLES - len(examples)) // left),
            seed=seed + place,
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
