"""`pumice eval`: a model on benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli.options import (
    LOADING,
    AllowErrorsOption,
    BatchSizeOption,
    BenchOptionsOption,
    JsonOption,
    LimitOption,
    LoadOptions,
    example,
    with_option_groups,
)
from pumice.cli.output import note, say, say_json
from pumice.cli.score_text import score_table
from pumice.cli.weights import weights_hash
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.eval.scores import Scores


_Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A checkpoint directory or a shipped name (pocket)."),
]
_Bench = Annotated[
    str | None, typer.Option("--bench", metavar="NAME[,NAME]", help="The benchmarks, or 'all'.")
]
_Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Directory of the official files.")
]
_Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write.")]
_Compared = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        "--compare",
        metavar="A B",
        help="No model: the differences between two directories written before (B - A).",
    ),
]
_Control = Annotated[
    str | None,
    typer.Option(
        "--control", help="'shuffled': each item gets another item's image; 'blank': a grey one."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lines = (
        "pumice eval pocket --bench pope,vqav2 --data runs/world --out runs/eval",
        "pumice eval --compare runs/eval runs/other",
    )
    app.command("eval", epilog=example(*lines))(with_option_groups(evaluate))


def evaluate(
    model: _Model = None,
    bench: _Bench = None,
    data: _Data = None,
    out: _Out = None,
    compare: _Compared = None,
    option: BenchOptionsOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = 16,
    control: _Control = None,
    allow_errors: AllowErrorsOption = False,
    loading: LoadOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Run a model on benchmarks, or compare two runs.

    DIR gets predictions.jsonl and scores.json per benchmark. A stopped run goes on where it
    stopped. Started by torchrun, each process asks its share. Exits with 1 when a score is
    withheld.
    """
    if compare is not None:
        if model or bench or out:
            raise PumiceError(
                "--compare A B reads two directories that `pumice eval` wrote, and asks no model. "
                "Leave MODEL, --bench and --out away."
            )
        _compare(compare, data, allow_errors, as_json)
        return
    needed = {"MODEL": model, "--bench": bench, "--data": data, "--out": out}
    absent = [name for name, value in needed.items() if value is None]
    if model is None or bench is None or data is None or out is None:
        raise PumiceError(
            f"{' and '.join(absent)} not given. Write `pumice eval MODEL --bench NAME --data DIR "
            f"--out DIR`, or `pumice eval --compare A B` for two directories written before."
        )
    _run(
        model, bench, data, out, option or (), limit, batch_size, control, allow_errors, loading,
        as_json,
    )  # fmt: skip


def _run(
    model: str,
    bench: str,
    data: Path,
    out: Path,
    option: Sequence[str],
    limit: int | None,
    batch_size: int,
    control: str | None,
    allow_errors: bool,
    loading: LoadOptions,
    as_json: bool,
) -> None:
    from pumice.eval.choose import choose_benchmarks
    from pumice.eval.controls import CONTROLS
    from pumice.eval.eval_report import report_eval
    from pumice.eval.locate import check_data_dir
    from pumice.eval.ranks import joined
    from pumice.eval.runner import run_benchmark
    from pumice.infer.model import load

    # All that can be wrong without a model, before minutes are spent on loading one.
    benchmarks = choose_benchmarks(bench.split(","), option)
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
                out / _folder(benchmark.name, control),
                weights=weights,
                limit=limit,
                control=control,
                allow_errors=allow_errors,
                ranks=ranks,
            )
            for benchmark in benchmarks
        ]
    if ranks.is_main:
        folders = [out / _folder(benchmark.name, control) for benchmark in benchmarks]
        report = report_eval(model, list(zip(benchmarks, folders, all_scores, strict=True)), out)
        _show(all_scores, as_json)
        note(f"report: {report}")
    if any(scores.failed for scores in all_scores):
        raise typer.Exit(1)


def _folder(benchmark: str, control: str | None) -> str:
    return benchmark if control is None else f"{benchmark}-{control}"


def _compare(
    folders: tuple[Path, Path], data: Path | None, allow_errors: bool, as_json: bool
) -> None:
    from pumice.cli.score_text import comparison_table
    from pumice.eval.compare import compare_runs

    a, b = folders
    found = compare_runs(a, b, data_dir=data, allow_errors=allow_errors)
    if as_json:
        benchmarks = {one.benchmark: one.to_dict() for one in found}
        say_json({"a": str(a), "b": str(b), "benchmarks": benchmarks})
        return
    say(comparison_table(found))
    for one in found:
        say(one.verdict)
        if one.left_out:
            note(f"{one.benchmark}: {one.left_out} items that one did not answer are left out")


def _show(all_scores: list[Scores], as_json: bool) -> None:
    if as_json:
        say_json({"benchmarks": {scores.benchmark: scores.to_dict() for scores in all_scores}})
    else:
        say(score_table(all_scores))
    for scores in all_scores:
        for line in scores.notes:
            note(f"{scores.benchmark}: {line}")
