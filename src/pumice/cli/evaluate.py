"""`pumice eval`: a model on benchmarks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli.options import (
    LOADING,
    AllowErrorsOption,
    BatchSizeOption,
    BenchOptionsOption,
    DataOption,
    JsonOption,
    LimitOption,
    LoadOptions,
    ModelArg,
    example,
    with_option_groups,
)
from pumice.cli.output import note, say, say_json
from pumice.cli.score_text import score_table
from pumice.cli.weights import weights_hash

if TYPE_CHECKING:
    from pumice.eval.scores import Scores


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    line = "pumice eval pocket --bench pope,vqav2 --data runs/world --out runs/eval"
    app.command("eval", epilog=example(line))(with_option_groups(evaluate))


def evaluate(
    model: ModelArg,
    bench: Annotated[
        str, typer.Option("--bench", metavar="NAME[,NAME]", help="The benchmarks, or 'all'.")
    ],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write.")],
    option: BenchOptionsOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = 16,
    control: Annotated[
        str | None,
        typer.Option(
            "--control",
            help="'shuffled': each item gets another item's image; 'blank': a grey one.",
        ),
    ] = None,
    allow_errors: AllowErrorsOption = False,
    loading: LoadOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Run a model on benchmarks.

    DIR gets predictions.jsonl and scores.json per benchmark. A stopped run goes on where it
    stopped. Started by torchrun, each process asks its share. Exits with 1 when a score is
    withheld.
    """
    from pumice.eval.choose import choose_benchmarks
    from pumice.eval.controls import CONTROLS
    from pumice.eval.locate import check_data_dir
    from pumice.eval.ranks import joined
    from pumice.eval.runner import run_benchmark
    from pumice.infer.model import load

    # All that can be wrong without a model, before minutes are spent on loading one.
    benchmarks = choose_benchmarks(bench.split(","), option or ())
    check_data_dir(data)
    if control is not None:
        CONTROLS[control]
    loaded = load(model, max_batch=batch_size, **asdict(loading))
    weights = weights_hash(model, loading.quantize, loading.adapter)
    with joined() as ranks:
        all_scores = [
            run_benchmark(
                loaded.generate,
                benchmark,
                data,
                out / (benchmark.name if control is None else f"{benchmark.name}-{control}"),
                weights=weights,
                limit=limit,
                control=control,
                allow_errors=allow_errors,
                ranks=ranks,
            )
            for benchmark in benchmarks
        ]
    if ranks.is_main:
        _show(all_scores, as_json)
    if any(scores.failed for scores in all_scores):
        raise typer.Exit(1)


def _show(all_scores: list[Scores], as_json: bool) -> None:
    if as_json:
        say_json({"benchmarks": {scores.benchmark: scores.to_dict() for scores in all_scores}})
    else:
        say(score_table(all_scores))
    for scores in all_scores:
        for line in scores.notes:
            note(f"{scores.benchmark}: {line}")
