"""`pumice run`: every stage of a recipe, then its evaluation and its report."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pumice.cli.options import (
    FeatureCacheGbOption,
    FeatureCacheOption,
    JsonOption,
    ResumeOption,
    TrackOption,
    example,
)
from pumice.cli.output import note, say, say_json
from pumice.cli.run_lock import alone_in
from pumice.cli.same_recipe import check_same_recipe, keep_recipe
from pumice.cli.score_text import score_table
from pumice.cli.stages import check_shares, first_stage_spec, stage_specs
from pumice.cli.weights import weights_hash
from pumice.cli.world import ensure_world
from pumice.core.errors import PumiceError
from pumice.core.log import LogOfProcess
from pumice.core.processes import ALONE, Processes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pumice.eval.scores import Scores
    from pumice.models.feature_cache import FeatureCache
    from pumice.recipe.schema import Recipe
    from pumice.train.run_log import Following
    from pumice.train.stages import StageResult, StageSpec


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What the evaluation of a run left: scores, the same with shuffled images, the report."""

    scores: list[Scores]
    shuffled: list[Scores]
    report: Path | None
    """Written by the main process; None in the others."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lines = (
        "pumice run pocket --out runs/pocket",
        "pumice run pocket stages.tune.steps=700 --out runs/short",
    )
    app.command("run", epilog=example(*lines))(run)


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped name or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.")
    ] = None,
    stage: Annotated[
        Literal["align", "tune"] | None, typer.Option("--stage", help="Run this stage only.")
    ] = None,
    resume: ResumeOption = "auto",
    feature_cache: FeatureCacheOption = None,
    feature_cache_gb: FeatureCacheGbOption = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Take finished stages from here, and keep them here."),
    ] = None,
    track: TrackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: train, evaluate, report.

    Its synthetic world is made first when it asks for one and the files are missing.
    DIR gets each stage's checkpoint, recipe.yaml (resolved), metrics.jsonl, scores.json and
    report.html. A stopped run goes on where it stopped. The evaluation follows the last stage;
    exits with 1 when a score is withheld. Started by torchrun, the processes train one model
    together; each keeps a log in DIR/logs. With --store, runs that begin alike train a stage once,
    and a process that still works on DIR is waited for; otherwise that is an error.
    """
    from pumice.core.processes import joined_processes
    from pumice.recipe.load import load_recipe
    from pumice.train.trackers import check_trackers

    loaded = load_recipe(recipe, overrides or [])
    check_choices(loaded, stage)
    check_store(store, resume)
    check_trackers(track or ())
    cache = _feature_cache(feature_cache, feature_cache_gb)
    resumes = resume == "auto"
    with (
        joined_processes() as group,
        alone_in(out, group, waits=store is not None),
        LogOfProcess(out / "logs") if group.size > 1 else nullcontext(),
    ):
        results, evaluated = _run_all(
            loaded, out, stage, group,
            partial(run_one, out=out, resume=resumes, features=cache, group=group, store=store),
            resumes=resumes, track=track or (),
        )  # fmt: skip
    if group.is_main:
        if as_json:
            say_json(_summary(out, results, evaluated))
        else:
            _tell(results, evaluated)
    if evaluated is not None and any(scores.failed for scores in evaluated.scores):
        raise typer.Exit(1)


def _run_all(
    recipe: Recipe,
    out: Path,
    stage: str | None,
    group: Processes,
    train: Callable[..., StageResult],
    *,
    resumes: bool,
    track: Sequence[str],
) -> tuple[list[StageResult], Evaluated | None]:
    from pumice.recipe.loss_bands import loss_band
    from pumice.train.run_log import Following

    data = group.from_main(lambda: prepare_run(recipe, out, resumes=resumes, stage=stage))
    specs = [s for s in stage_specs(recipe, data, out) if stage is None or s.name == stage]
    group.from_main(lambda: check_data(specs))
    results = [
        train(spec, following=Following(band=loss_band(recipe, spec.name), trackers=track))
        for spec in specs
    ]
    # Again: only now is it known that a run that goes on has the data and backbones it began with.
    group.from_main(lambda: keep_recipe(recipe, out))
    if specs[-1].name != recipe.stage_list()[-1][0]:
        return results, None
    if recipe.eval is None:
        return results, group.from_main(lambda: report_without_scores(recipe, results, data, out))
    return results, evaluate_run(recipe, results, data, out)


def prepare_run(recipe: Recipe, out: Path, *, resumes: bool, stage: str | None) -> Path:
    """Makes or finds what the stages read, and writes recipe.yaml; gives the data directory."""
    going_on = check_same_recipe(recipe, out, resumes=resumes, stage=stage)
    data = prepare_data(recipe, out)
    if not going_on:
        keep_recipe(recipe, out)
    return data


def check_store(store: Path | None, resume: str) -> None:
    """A store needs stages that may be taken from it, and one process that keeps them there."""
    from pumice.core.distributed import world_size

    if store is None:
        return
    if resume == "never":
        raise PumiceError(
            f"--resume never trains every stage again, and --store {store} takes finished ones "
            "from there. Leave one of the two away."
        )
    if world_size() > 1:
        raise PumiceError(
            f"--store {store} was given to {world_size()} processes (WORLD_SIZE), and only runs of "
            "one process keep their stages there. Leave --store away, or start it without torchrun."
        )


def check_choices(recipe: Recipe, stage: str | None) -> None:
    """Every name in the recipe means something, before anything is made or trained."""
    from pumice.core.distributed import world_size
    from pumice.processing.own_template import OWN
    from pumice.processing.templates import TEMPLATES
    from pumice.train.build import check_model

    names = [name for name, _ in recipe.stage_list()]
    if stage is not None and stage not in names:
        raise PumiceError(
            f"recipe {recipe.name!r} has no stage {stage!r}; it has: {', '.join(names)}. Leave "
            "--stage out to run all of them."
        )
    for name in names:
        check_model(first_stage_spec(recipe, name))
    check_shares(recipe, world_size())
    for template in (recipe.model.template, *(s.template for _, s in recipe.stage_list())):
        if template not in (None, OWN):
            TEMPLATES[template]
    if recipe.eval is not None:
        from pumice.eval.choose import choose_benchmarks

        choose_benchmarks(recipe.eval.benchmarks, recipe.eval.option_list())


def check_data(specs: Sequence[StageSpec]) -> None:
    """Open the data of every stage, so that what a later one cannot read is told at once."""
    for spec in specs:
        for entry in spec.data:
            entry.open()


def prepare_data(recipe: Recipe, out: Path) -> Path:
    """The directory the recipe's paths are relative to, with every training file in it."""
    from pumice.data.open_source import is_pattern

    data = out / "data" if recipe.data is None else Path(recipe.data).expanduser()
    if recipe.world is not None:
        ensure_world(data, recipe.world)
    for name, stage in recipe.stage_list():
        for entry in stage.data:
            for path in (data / name for name in (entry.path, entry.images) if name is not None):
                if not path.exists() and not is_pattern(path):
                    raise PumiceError(
                        f"stage {name!r} of recipe {recipe.name!r} reads {path}, which does not "
                        "exist. Set data=DIR to the directory the recipe's paths are relative to."
                    )
    return data


def _feature_cache(directory: Path | None, gigabytes: float | None) -> FeatureCache | None:
    from pumice.models.feature_cache import FeatureCache

    if directory is None:
        if gigabytes is not None:
            raise PumiceError(
                f"--feature-cache-gb {gigabytes:g} limits a feature cache, and none is given. Add "
                f"--feature-cache DIR."
            )
        return None
    return FeatureCache(
        directory, max_bytes=None if gigabytes is None else int(gigabytes * 1000**3)
    )


def run_one(
    spec: StageSpec,
    out: Path,
    *,
    resume: bool,
    features: FeatureCache | None = None,
    group: Processes = ALONE,
    store: Path | None = None,
    following: Following | None = None,
) -> StageResult:
    """One stage; its starting checkpoint must be there. With a `store` it may come from there."""
    from pumice.train.stage_store import StageStore
    from pumice.train.stages import run_stage

    if spec.init is not None and not spec.init.is_dir():
        raise PumiceError(
            f"stage {spec.name!r} starts from {spec.init}, which does not exist. Run the stage "
            f"{spec.init.name!r} first, or leave --stage out to run all stages."
        )
    train = partial(
        run_stage, spec, out, resume=resume, features=features, group=group, following=following
    )
    return train() if store is None else StageStore(store).run(spec, out, train)


def evaluate_run(recipe: Recipe, results: list[StageResult], data: Path, out: Path) -> Evaluated:
    """Score the last checkpoint, with its own images and with shuffled ones; then the report.

    The shuffled-image control tells what the model answers without looking.
    """
    from pumice.cli.run_report import report_run
    from pumice.core.files import write_json
    from pumice.eval.choose import choose_benchmarks
    from pumice.eval.ranks import Ranks, joined
    from pumice.eval.runner import run_benchmark
    from pumice.infer.model import load

    start = time.monotonic()
    checkpoint = results[-1].checkpoint
    chosen = recipe.eval
    if chosen is None:
        raise PumiceError(f"recipe {recipe.name!r} has no eval section; add one to evaluate it.")
    model = load(checkpoint, max_batch=chosen.batch_size)
    weights = weights_hash(str(checkpoint))
    eval_data = data if chosen.data is None else Path(chosen.data).expanduser()

    def scored(control: str | None, ranks: Ranks) -> list[Scores]:
        return [
            run_benchmark(
                model.generate,
                benchmark,
                eval_data,
                out
                / "eval"
                / (benchmark.name if control is None else f"{benchmark.name}-{control}"),
                weights=weights,
                limit=chosen.limit,
                control=control,
                seed=recipe.seed,
                ranks=ranks,
            )
            for benchmark in choose_benchmarks(chosen.benchmarks, chosen.option_list())
        ]

    with joined() as ranks:
        scores, shuffled = scored(None, ranks), scored("shuffled", ranks)
    if not ranks.is_main:
        return Evaluated(scores, shuffled, None)
    seconds = time.monotonic() - start
    write_json(
        out / "scores.json", {**_score_columns(scores, shuffled), "seconds": round(seconds, 2)}
    )
    report = report_run(recipe, results, scores, shuffled, data=eval_data, out=out, seconds=seconds)
    return Evaluated(scores, shuffled, report)


def report_without_scores(
    recipe: Recipe, results: list[StageResult], data: Path, out: Path
) -> Evaluated:
    """The report of a run that nothing judges: its curves, held-out answers and data."""
    from pumice.cli.run_report import report_run

    report = report_run(recipe, results, [], [], data=data, out=out, seconds=None)
    return Evaluated([], [], report)


def _score_columns(scores: list[Scores], shuffled: list[Scores]) -> dict[str, Any]:
    """The content of a run's scores.json: per benchmark the scores and those of the control."""
    return {
        "benchmarks": {
            own.benchmark: {**own.to_dict(), "shuffled": other.to_dict()}
            for own, other in zip(scores, shuffled, strict=True)
        }
    }


def _summary(out: Path, results: list[StageResult], evaluated: Evaluated | None) -> dict[str, Any]:
    stages = {
        result.checkpoint.name: {
            "checkpoint": str(result.checkpoint),
            "steps": result.steps,
            "seconds": result.seconds,
            "final_loss": result.final_loss,
        }
        for result in results
    }
    summary: dict[str, Any] = {"out": str(out), "stages": stages}
    if evaluated is not None:
        summary |= _score_columns(evaluated.scores, evaluated.shuffled)
        summary["report"] = str(evaluated.report)
    return summary


def _tell(results: list[StageResult], evaluated: Evaluated | None) -> None:
    for result in results:
        say(f"{result.checkpoint}: {result.steps} steps, final loss {result.final_loss:.3f}")
    if evaluated is None:
        return
    if evaluated.scores:
        say("\n" + score_table(evaluated.scores, evaluated.shuffled))
    for scores in evaluated.scores:
        for line in scores.notes:
            note(f"{scores.benchmark}: {line}")
    say(f"\nreport: {evaluated.report}")
