"""`pumice score`: score an answers file without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pumice.cli.options import (
    AllowErrorsOption,
    BenchOptionsOption,
    CategoriesOption,
    DataOption,
    JsonOption,
    example,
)
from pumice.cli.output import note, say, say_json
from pumice.cli.score_text import category_tables, score_table


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    line = "pumice score pope --data runs/world --answers answers.jsonl --json"
    app.command("score", epilog=example(line))(score)


def score(
    benchmark: Annotated[str, typer.Argument(metavar="BENCH", help="A benchmark, such as pope.")],
    data: DataOption,
    answers: Annotated[
        Path,
        typer.Option(
            "--answers", metavar="FILE", help="LLaVA answer rows, or a file for the server."
        ),
    ],
    option: BenchOptionsOption = None,
    allow_errors: AllowErrorsOption = False,
    categories: CategoriesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score an answers file without a model.

    The answers are read and scored by the benchmark's official rule.
    Exits with 1 when the score is withheld, because answers are errors or missing.
    """
    from pumice.eval.choose import choose_benchmark
    from pumice.eval.runner import rescore

    chosen = choose_benchmark(benchmark, option or ())
    scores = rescore(chosen, data, answers, allow_errors=allow_errors)
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
