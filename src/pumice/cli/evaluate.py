"""`pumice eval`: a model on benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli.endpoint import check_options, is_url, read_extra, remote_model
from pumice.cli.judging import JUDGE, REPLIES, JudgeOptions, judged
from pumice.cli.options import (
    ENDPOINT,
    LOADING,
    AllowErrorsOption,
    ApiExtraOption,
    BatchSizeOption,
    BenchOptionsOption,
    CategoriesOption,
    EndpointOptions,
    JsonOption,
    LimitOption,
    LoadOptions,
    example,
    with_option_groups,
)
from pumice.cli.output import note, say, say_json
from pumice.cli.score_text import category_tables, score_table
from pumice.cli.weights import weights_hash
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.eval.benchmark import Benchmark, Item
    from pumice.eval.runner import Answerer
    from pumice.eval.scores import Scores, Served


_Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A checkpoint directory, a shipped name (pocket), or http://host/v1."
    ),
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
        "pumice eval http://127.0.0.1:8000/v1 --bench pope --data runs/world --out runs/served",
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
    categories: CategoriesOption = False,
    endpoint: EndpointOptions = ENDPOINT,
    api_extra: ApiExtraOption = None,
    judge: JudgeOptions = JUDGE,
    loading: LoadOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Run a model on benchmarks, or compare two runs.

    MODEL may be the address of an OpenAI-compatible endpoint; its key is read from PUMICE_API_KEY
    or OPENAI_API_KEY. DIR gets predictions.jsonl and scores.json per benchmark. A stopped run goes
    on. Under torchrun each process asks its share. Without --judge, free answers are scored by
    their words. Exits with 1 when a score is withheld.
    """
    if compare is not None:
        if model or bench or out:
            raise PumiceError(
                "--compare A B reads two directories that `pumice eval` wrote, and asks no model. "
                "Leave MODEL, --bench and --out away."
            )
        _compare(compare, data, allow_errors, as_json, categories)
        return
    needed = {"MODEL": model, "--bench": bench, "--data": data, "--out": out}
    absent = [name for name, value in needed.items() if value is None]
    if model is None or bench is None or data is None or out is None:
        raise PumiceError(
            f"{' and '.join(absent)} not given. Write `pumice eval MODEL --bench NAME --data DIR "
            f"--out DIR`, or `pumice eval --compare A B` for two directories written before."
        )
    from pumice.eval.choose import choose_benchmarks
    from pumice.eval.controls import CONTROLS
    from pumice.eval.locate import check_data_dir, load_all

    # All that can be wrong without a model, before minutes are spent on loading one.
    check_options(model, endpoint, loading)
    extra = read_extra(model, api_extra or ())
    chosen = choose_benchmarks(bench.split(","), option or ())
    check_data_dir(data)
    if control is not None:
        CONTROLS[control]
    loaded = load_all(chosen, data)
    with (
        judged(chosen, judge, out / REPLIES) as benchmarks,
        _subject(model, batch_size, endpoint, extra, loading) as subject,
    ):
        job = _Job(benchmarks, data, out, limit, control, allow_errors, loaded)
        _run(job, subject, as_json, categories)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be evaluated, and how."""

    benchmarks: Sequence[Benchmark]
    data: Path
    out: Path
    limit: int | None
    control: str | None
    allow_errors: bool
    loaded: dict[str, list[Item]]
    """The items by the name of the benchmark; each goes when it is asked."""

    def folder(self, benchmark: Benchmark) -> Path:
        """Where the files of one benchmark go."""
        name = benchmark.name
        return self.out / (name if self.control is None else f"{name}-{self.control}")


@dataclass(frozen=True, slots=True)
class _Subject:
    """Who is asked: how it answers, what names it, and where it is served if it is not here."""

    title: str
    answer: Answerer
    weights: str
    served: Served | None = None


@contextmanager
def _subject(
    model: str,
    batch_size: int,
    endpoint: EndpointOptions,
    extra: Mapping[str, Any],
    loading: LoadOptions,
) -> Iterator[_Subject]:
    """The model of a directory or a shipped name, loaded; or the one at an address."""
    if not is_url(model):
        from pumice.infer.model import load

        loaded = load(model, max_batch=batch_size, **asdict(loading))
        weights = weights_hash(model, loading.quantize, loading.adapter)
        yield _Subject(model, loaded.generate, weights)
        return
    from pumice.eval.scores import Served, fingerprint

    with remote_model(model, endpoint, extra) as remote:
        served = Served(remote.client.url, remote.name, remote.images, remote.extra)
        weights = f"endpoint-{fingerprint([served.url, served.model])}"
        yield _Subject(f"{served.model} at {served.url}", remote.generate, weights, served)


def _run(job: _Job, subject: _Subject, as_json: bool, categories: bool) -> None:
    from pumice.eval.eval_report import report_eval
    from pumice.eval.ranks import joined
    from pumice.eval.runner import run_benchmark

    with joined() as ranks:
        all_scores = [
            run_benchmark(
                subject.answer,
                benchmark,
                job.data,
                job.folder(benchmark),
                weights=subject.weights,
                limit=job.limit,
                control=job.control,
                allow_errors=job.allow_errors,
                served=subject.served,
                ranks=ranks,
                loaded=job.loaded.pop(benchmark.name),
            )
            for benchmark in job.benchmarks
        ]
    if ranks.is_main:
        folders = map(job.folder, job.benchmarks)
        runs = list(zip(job.benchmarks, folders, all_scores, strict=True))
        report = report_eval(subject.title, runs, job.out)
        _show(all_scores, as_json, categories)
        note(f"report: {report}")
    if any(scores.failed for scores in all_scores):
        raise typer.Exit(1)


def _compare(
    folders: tuple[Path, Path],
    data: Path | None,
    allow_errors: bool,
    as_json: bool,
    categories: bool,
) -> None:
    from pumice.cli.score_text import comparison_categories, comparison_table
    from pumice.eval.compare import compare_runs, in_one_alone

    a, b = folders
    found = compare_runs(a, b, data_dir=data, allow_errors=allow_errors)
    alone = in_one_alone(a, b)
    if as_json:
        benchmarks = {one.name: one.to_dict() for one in found}
        told = {"a": str(a), "b": str(b), "benchmarks": benchmarks}
        say_json(told | {"only_in_a": alone[0], "only_in_b": alone[1]})
        return
    say(comparison_table(found))
    if categories:
        say(comparison_categories(found))
    for one in found:
        say(one.verdict)
        if one.left_out:
            note(f"{one.name}: {one.left_out} items that one did not answer are left out")
    for folder, names in zip(folders, alone, strict=True):
        if names:
            note(f"only in {folder}, so not compared: {', '.join(names)}")


def _show(all_scores: list[Scores], as_json: bool, categories: bool) -> None:
    if as_json:
        say_json({"benchmarks": {scores.benchmark: scores.to_dict() for scores in all_scores}})
    else:
        say(score_table(all_scores))
        if categories:
            say(category_tables(all_scores))
    for scores in all_scores:
        for line in scores.notes:
            note(f"{scores.benchmark}: {line}")
