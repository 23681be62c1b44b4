"""Scoring answers by verdicts that a judge gave earlier: published reviews and grades."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pumice.core.errors import DataError, PumiceError
from pumice.eval.benchmark import Answer, Benchmark, Matching, Row
from pumice.eval.judge import Judge
from pumice.eval.judged_benchmark import JudgedBenchmark
from pumice.eval.locate import check_data_dir, load_items, well_formed
from pumice.eval.prediction_files import answered_row
from pumice.eval.runner import matched_answers
from pumice.eval.scores import Scores, full_protocol, make_scores
from pumice.eval.verdicts import Verdict

_NO_ANSWERS = "only the reviews were given: that they are of these answers is not checked"


def rescore_reviews(
    benchmark: Benchmark,
    data_dir: Path,
    reviews: Sequence[Path],
    answers_file: Path | None = None,
    *,
    allow_errors: bool = False,
) -> Scores:
    """Scores by the verdicts in files, each of one or more runs; no judge is asked.

    The answers are not needed. With them, those without a review are counted apart from questions
    that were not answered.
    """
    if not isinstance(benchmark, JudgedBenchmark):
        raise PumiceError(
            f"{benchmark.name} is scored by rule and has no reviews. Leave them out, and give the "
            f"answers."
        )
    check_data_dir(data_dir)
    runs: list[dict[str, Verdict]] = []
    models: list[str] = []
    for path in reviews:
        model, found = well_formed(partial(benchmark.read_reviews, path), str(path))
        models += [model] if model and model not in models else []
        runs += found
    judged = benchmark.judged_by(Judge("reviews", ", ".join(models), len(runs)))
    if answers_file is None:
        items = load_items(judged, data_dir)
        unknown = {name: Answer(name, "") for run in runs for name in run}
        matching = Matching(unknown, (_NO_ANSWERS,))
    else:
        items, matching = matched_answers(judged, data_dir, answers_file)
    known = {item.id for item in items}
    strangers = sorted({name for run in runs for name in run if name not in known})
    if strangers:
        raise DataError(
            f"{', '.join(map(str, reviews))}: {len(strangers)} reviews are of questions that "
            f"{benchmark.title} in {data_dir} does not have (the first: {strangers[0]!r}). Give "
            f"the reviews and the official files of the same benchmark."
        )
    answers = matching.answers
    rows = [answered_row(judged, item, answers[item.id]) for item in items if item.id in answers]
    return make_scores(
        judged,
        items,
        [_reviewed(judged, row, runs) for row in rows],
        protocol=full_protocol(judged, items),
        notes=matching.notes,
        flawed=matching.flawed,
        allow_errors=allow_errors,
    )


def are_reviews(benchmark: Benchmark, path: Path) -> bool:
    """Whether a file holds a judge's verdicts, and not answers."""
    if not isinstance(benchmark, JudgedBenchmark):
        return False
    try:
        well_formed(partial(benchmark.read_reviews, path), str(path))
    except DataError:
        return False
    return True


def _reviewed(benchmark: JudgedBenchmark, row: Row, runs: Sequence[dict[str, Verdict]]) -> Row:
    if row.prediction.error is not None:
        return row
    verdicts = [
        run.get(row.item.id, Verdict(error=f"run {number} of the reviews has none of it"))
        for number, run in enumerate(runs, start=1)
    ]
    return benchmark.with_verdicts(row, verdicts)
