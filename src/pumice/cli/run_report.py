"""report.html of a run: its scores beside the blind controls, loss curves, examples and costs."""

from __future__ import annotations

import io
import platform
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pumice
from pumice.core.files import read_json, read_jsonl
from pumice.eval.browser import browse
from pumice.eval.categories import category_section
from pumice.eval.charts import Band
from pumice.eval.choose import benchmark_of
from pumice.eval.examples import pick_examples
from pumice.eval.published import published_section
from pumice.eval.report import Example, ReportData, Tiling, score_row, write_report
from pumice.recipe.load import resolved_yaml
from pumice.recipe.loss_bands import loss_band
from pumice.train.data_card import card_text

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
    seconds: float | None,
) -> Path:
    """Write `out`/report.html; `data` holds the benchmarks' files, `seconds` is scoring's time.

    A run that nothing judges has no scores, and None seconds.
    """
    path = out / "report.html"
    benchmarks = [benchmark_of(own) for own in scores]
    rows = [
        score_row(own, bench.title, bench.headline, blind=other, most=bench.most)
        for bench, own, other in zip(benchmarks, scores, shuffled, strict=True)
    ]
    examples = _examples(scores, data, out / "eval", recipe.seed)
    page = ReportData(
        title=f"{recipe.name}: report",
        about=recipe.about,
        scores=rows,
        published=published_section(scores),
        categories=category_section(list(zip(benchmarks, scores, strict=True))),
        browser=browse(
            [
                (bench, out / "eval" / bench.name, own)
                for bench, own in zip(benchmarks, scores, strict=True)
            ]
        ),
        curves=_curves(out / "metrics.jsonl"),
        bands=_bands(recipe),
        examples=examples,
        tiling=_tiling(results[-1].checkpoint, examples),
        recipe=resolved_yaml(recipe),
        facts=_facts(recipe, results),
        costs=_costs(results, seconds),
        footnotes=[f"{own.benchmark}: {line}" for own in scores for line in own.notes]
        + _probe_lines(results),
    )
    write_report(path, page)
    return path


def _curves(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) points per stage, in the order of training."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    if metrics.is_file():
        for _, row in read_jsonl(metrics, allow_cut_tail=True):
            curves[row["stage"]].append((row["step"], row["loss"]))
            if "validation" in row:
                held = f"{row['stage']}, held out"
                curves[held].append((row["step"], row["validation"]["loss"]))
    return dict(curves)


def _bands(recipe: Recipe) -> dict[str, Band]:
    """Where the loss of each stage lies in healthy runs, as far as that is recorded."""
    found = {name: loss_band(recipe, name) for name, _ in recipe.stage_list()}
    return {
        name: Band(steps=band.steps, low=band.low, high=band.high, title=band.title)
        for name, band in found.items()
        if band is not None
    }


def _examples(scores: Sequence[Scores], data: Path, evaluated: Path, seed: int) -> list[Example]:
    """Twelve answered questions, shared out between the benchmarks and drawn by chance."""
    examples: list[Example] = []
    for place, own in enumerate(scores):
        left = len(scores) - place
        # Another draw for each benchmark, or they would all show the same pictures.
        examples += pick_examples(
            benchmark_of(own),
            data,
            evaluated / own.benchmark,
            -(-(_EXAMPLES - len(examples)) // left),
            seed=seed + place,
        )
    return examples


def _tiling(checkpoint: Path, examples: Sequence[Example]) -> Tiling | None:
    """How the model tiles the largest image of the examples; None for one that does not tile."""
    from pumice.core.images import open_image
    from pumice.models.tiling import plan_image
    from pumice.processing.processor import Processor
    from pumice.processing.tile_drawing import draw_plan

    processor = Processor.load(checkpoint)
    spec = processor.image_spec
    files = [example.image for example in examples if example.image is not None]
    if spec.tiling is None or not files:
        return None
    pictures = [open_image(file, where="an example of the report") for file in files]
    picture = max(pictures, key=lambda picture: picture.width * picture.height)
    plan = plan_image(picture.size, spec.tiling, processor.view_side, processor.image_tokens)
    buffer = io.BytesIO()
    draw_plan(picture, plan, spec).save(buffer, "PNG", optimize=True)
    counts, (across, down) = plan.tokens, plan.grid
    words = f"{across} x {down} tiles of {plan.tile} pixels, {plan.views} views and "
    if processor.image_mark:
        words += "one position in the text, from which gated layers look at all of them."
    else:
        words += (
            f"{counts.total} image tokens: {counts.global_view} of the global view, "
            f"{counts.tiles} of the tiles and {counts.row_end} row ends. {counts.removed} that "
            f"show nothing but padding are left out."
        )
    return Tiling(drawing=buffer.getvalue(), words=words)


def _facts(recipe: Recipe, results: Sequence[StageResult]) -> dict[str, str]:
    model = recipe.model
    return {
        "Model": f"{model.vision} + {model.connector} + {model.language}",
        "Checkpoint": str(results[-1].checkpoint),
        "Data": "; ".join(_data_cards(results)),
        **_validation_facts(results),
        **_band_facts(results),
        "Seed": str(recipe.seed),
        "Made with": f"pumice {pumice.__version__}, Python {platform.python_version()}",
    }


def _data_cards(results: Sequence[StageResult]) -> list[str]:
    """Every source of every stage once, with what its verification found."""
    records = [read_json(result.checkpoint / "training.json") for result in results]
    # A stage of an older version says nothing of its data.
    cards = [card_text(entry) for record in records for entry in record.get("data", [])]
    return list(dict.fromkeys(cards)) or ["not recorded"]


def _validations(results: Sequence[StageResult]) -> list[tuple[str, dict[str, Any]]]:
    """The last look at the held-out rows of each stage that has some."""
    records = [read_json(result.checkpoint / "training.json") for result in results]
    return [(r["stage"], r["validation"]) for r in records if r.get("validation")]


def _validation_facts(results: Sequence[StageResult]) -> dict[str, str]:
    from pumice.train.validation import warning

    facts: dict[str, str] = {}
    for stage, found in _validations(results):
        words = f"loss {found['loss']:.3f} on {found['rows']} rows"
        if found["gap"] is not None:
            words += f", {found['shuffled_loss']:.3f} with other images"
        facts[f"Held out, {stage}"] = words
        if found["image_not_used"]:
            facts[f"WARNING, {stage}"] = warning(stage, found)
    return facts


def _band_facts(results: Sequence[StageResult]) -> dict[str, str]:
    """What left the band of its recipe."""
    records = [read_json(result.checkpoint / "training.json") for result in results]
    found = {record["stage"]: record.get("loss_band", {}).get("warning") for record in records}
    return {f"WARNING, loss of {stage}": words for stage, words in found.items() if words}


def _probe_lines(results: Sequence[StageResult]) -> list[str]:
    return [
        f"{stage}, held out {entry['id']}: {entry['question']!r} is answered {entry['said']!r} "
        f"(wanted: {entry['wanted']!r})"
        for stage, found in _validations(results)
        for entry in found["probe"]
    ]


def _costs(results: Sequence[StageResult], seconds: float | None) -> list[dict[str, str]]:
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
    if seconds is not None:
        lines.append({"Part": "evaluation", "Time": _clock(seconds)})
    return lines


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
