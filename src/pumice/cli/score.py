"""`pumice score`: score an answers file without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pumice.cli.judging import JUDGE, REPLIES, JudgeOptions, judged
from pumice.cli.options import (
    AllowErrorsOption,
    BenchOptionsOption,
    CategoriesOption,
    DataOption,
    JsonOption,
    example,
    with_option_groups,
)
from pumice.cli.output import note, say, say_json
from pumice.cli.score_text import category_tables, score_table
from pumice.core.errors import PumiceError


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lines = (
        "pumice score pope --data runs/world --answers answers.jsonl --json",
        "pumice score mmvet --data DIR --answers answers.json --reviews grade-5runs.json",
    )
    app.command("score", epilog=example(*lines))(with_option_groups(score))


def score(
    benchmark: Annotated[str, typer.Argument(metavar="BENCH", help="A benchmark, such as pope.")],
    data: DataOption,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers", metavar="FILE", help="LLaVA answer rows, or a file for the server."
        ),
    ] = None,
    reviews: Annotated[
        list[Path] | None,
        typer.Option(
            "--reviews",
            "--grades",
            metavar="FILE",
            help="A judge's verdicts, LLaVA-Bench's or MM-Vet's; a run each, repeatable.",
        ),
    ] = None,
    option: BenchOptionsOption = None,
    allow_errors: AllowErrorsOption = False,
    categories: CategoriesOption = False,
    judge: JudgeOptions = JUDGE,
    as_json: JsonOption = False,
) -> None:
    """Score an answers file without a model.

    The answers are read and scored by the benchmark's official rule; those of llava_wild and mmvet
    by --reviews, by a --judge, or by their words. Exits with 1 when the score is withheld, because
    answers are errors or missing.
    """
    from pumice.eval.choose import choose_benchmark
    from pumice.eval.reviews import are_reviews, rescore_reviews
    from pumice.eval.runner import rescore

    chosen = choose_benchmark(benchmark, option or ())
    if answers is not None and not reviews and are_reviews(chosen, answers):
        reviews, answers = [answers], None
    if reviews:
        if judge != JUDGE:
            raise PumiceError("--reviews and --judge were given; one of them scores the answers.")
        scores = rescore_reviews(chosen, data, reviews, answers, allow_errors=allow_errors)
    elif answers is None:
        raise PumiceError("--answers not given: a file of answers is needed.")
    else:
        replies = answers.with_name(f"{answers.name}.{REPLIES}")
        with judged([chosen], judge, replies) as (benchmark_judged,):
            scores = rescore(benchmark_judged, data, answers, allow_errors=allow_errors)
    if as_json:
        say_json(scores.to_dict())
    else:
        say(score_table([scores]))
        if categories:
            say(category_tables([scores]))
    for line in scores.notes:
        note(f"{scores.benchmark}: {line}")
    if scores.withheld:
        raise typer.Exit(1)
