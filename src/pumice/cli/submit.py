"""`pumice submit`: the file that a benchmark's evaluation server takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pumice.cli.options import BenchOptionsOption, DataOption, JsonOption, example
from pumice.cli.output import note, say, say_json


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        "submit",
        epilog=example(
            "pumice submit vizwiz --data DIR --answers answers.jsonl --out vizwiz.json",
            "pumice submit vqav2 --data DIR --answers answers.jsonl --out vqav2.json "
            "--empty-missing",
        ),
    )(submit)


def submit(
    benchmark: Annotated[
        str, typer.Argument(metavar="BENCH", help="A benchmark with a server, such as vqav2.")
    ],
    data: DataOption,
    answers: Annotated[
        Path, typer.Option("--answers", metavar="FILE", help="The answers, as for score.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The .json, .jsonl or .xlsx to write.")
    ],
    option: BenchOptionsOption = None,
    empty_missing: Annotated[
        bool, typer.Option("--empty-missing", help="Questions without an answer get an empty one.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the file that a benchmark's server takes.

    One row for every question, in the server's columns and normalised as it expects.
    A question without an answer is an error.
    """
    from pumice.eval.choose import choose_benchmark
    from pumice.eval.submit import write_submission

    chosen = choose_benchmark(benchmark, option or (), server=True)
    done = write_submission(chosen, data, answers, out, empty_missing=empty_missing)
    if as_json:
        say_json({**asdict(done), "path": str(done.path)})
    else:
        say(str(done.path))
    note(f"{done.rows} rows, {done.empty} of them empty")
    for line in done.notes:
        note(line)
