"""`pumice study`: a base recipe, what is changed, and what difference it makes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pumice.cli.options import JsonOption, example
from pumice.cli.output import note, say, say_json, table
from pumice.cli.study_costs import cost_counter
from pumice.cli.world import ensure_world
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pumice.study.analyse import Findings
    from pumice.study.cells import Cell
    from pumice.study.runner import Launch
    from pumice.study.spec import StudyFile
    from pumice.study.store import Store


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lines = (
        "pumice study --list",
        "pumice study data-efficiency --plan",
        "pumice study mine.yaml --out runs/mine --workers 2",
        "pumice study connectors axes.connector.variants.mine='{model.connector: mine.py}' --plan",
    )
    app.command("study", epilog=example(*lines))(study)


def study(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="A shipped name or a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the study.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where tables and plots go.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where runs lie that studies share; DIR/store if absent."),
    ] = None,
    size: Annotated[
        str, typer.Option("--size", metavar="NAME", help="A size that the file has.")
    ] = "pocket",
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Only the first N seeds of the file.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Runs at a time.")] = 1,
    plan: Annotated[
        bool, typer.Option("--plan", help="List the runs and their time; end.")
    ] = False,
    launcher: Annotated[
        Literal["local", "slurm"],
        typer.Option("--launcher", help="slurm: one job of the cluster for each run."),
    ] = "local",
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of submitit, such as gpus_per_node=8."),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the shipped studies.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study: every choice with every seed, then what differs and by how much.

    Lists its runs and their time first. Runs that the store has are not run again, a stopped study
    goes on, and a run that fails is a line with its error. DIR gets study.html, study.json, tables
    (Markdown, CSV, LaTeX) and plots. Exits with 1 when a run failed.
    """
    from pumice.study.spec import load_study

    if listing:
        _list(as_json)
        return
    if file is None or (out is None and not plan):
        raise PumiceError(
            "a study needs its FILE and --out DIR. Write `pumice study FILE --out DIR`, or "
            "`pumice study --list` for the shipped ones."
        )
    loaded, path = load_study(file, size, overrides or ())
    if seeds is not None:
        loaded = _fewer_seeds(loaded, seeds)
    _run(loaded, path, out, store, workers, plan, _launch(launcher, slurm, workers, out), as_json)


def _run(
    study: StudyFile,
    path: Path,
    out: Path | None,
    store_dir: Path | None,
    workers: int,
    plan: bool,
    launch: Launch,
    as_json: bool,
) -> None:
    from pumice.study.analyse import metrics_of
    from pumice.study.cells import cells_of
    from pumice.study.runner import run_missing
    from pumice.study.store import Store

    place = store_dir or (out or Path()) / "store"
    store, cost_of = Store(place), cost_counter(study.budget)
    cells = cells_of(study, path, cost_of)
    metrics_of(study, cells)
    record = _plan(study, cells, store, workers)
    if plan or out is None:
        say_json(record) if as_json else say(_plan_text(record))
        return
    note(_plan_text(record))
    # A batch system says SIGTERM where a person presses Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_missing(cells, store, launch, ensure_world, workers=workers, features_gb=study.features_gb)
    _report(study, cells, store, out, as_json)


def _report(
    study: StudyFile, cells: Sequence[Cell], store: Store, out: Path, as_json: bool
) -> None:
    from pumice.study.report import write_report

    findings = write_report(study, cells, store, out)
    if as_json:
        say_json(findings.to_dict())
    else:
        say(_findings_text(findings))
        say(f"\nreport: {out / 'study.html'}")
    if findings.failed:
        raise typer.Exit(1)


def _findings_text(findings: Findings) -> str:
    from pumice.study.tables import errors_of, headline, metric_rows, reading

    blocks = [headline(findings)]
    for metric in findings.metrics:
        head = (metric.title, "mean (95 %)", "difference (95 %)", "verdict", "seeds")
        blocks.append(table([head, *metric_rows(findings, metric)]))
    if lost := errors_of(findings):
        blocks.append("\n".join(["Runs without a result:", *lost]))
    return "\n\n".join([*blocks, reading(findings)])


def _fewer_seeds(study: StudyFile, count: int) -> StudyFile:
    if count > len(study.seeds):
        raise PumiceError(
            f"--seeds {count}, but study {study.name!r} has {len(study.seeds)}: "
            f"{', '.join(map(str, study.seeds))}. Give a smaller number, or add seeds to the file."
        )
    return study.model_copy(update={"seeds": study.seeds[:count]})


def _launch(launcher: str, settings: list[str] | None, workers: int, out: Path | None) -> Launch:
    from pumice.recipe.yaml_text import parse_yaml
    from pumice.study.launch import LocalProcesses, SlurmJobs

    if launcher == "local":
        if settings:
            raise PumiceError("--slurm is for --launcher slurm; leave it out to run here.")
        return LocalProcesses(max(1, (os.cpu_count() or 1) // workers))
    chosen: dict[str, Any] = {}
    for text in settings or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise PumiceError(
                f"--slurm {text!r} is not of the form KEY=VALUE, such as timeout_min=600."
            )
        chosen[key] = parse_yaml(value, f"--slurm {text}")
    return SlurmJobs((out or Path()) / "jobs", chosen)


def _list(as_json: bool) -> None:
    from pumice.study.spec import load_study, study_names

    about = {name: load_study(name)[0].about for name in study_names()}
    if as_json:
        say_json({"studies": [{"name": name, "about": text} for name, text in about.items()]})
    else:
        say(table(about.items()))


def _plan(study: StudyFile, cells: Sequence[Cell], store: Store, workers: int) -> dict[str, Any]:
    """The runs, what they cost and how long the missing ones will take, as plain values."""
    from pumice.study.cells import reference_arm
    from pumice.study.estimate import estimated_seconds, measured_rate

    reference = reference_arm(study, [cell.arm for cell in cells])
    base = next(cell for cell in cells if cell.arm == reference)
    rate = measured_rate(store, cells, base)
    seconds = estimated_seconds(cells, store, rate)
    unique = {cell.key: cell for cell in cells}
    rows = [
        {
            "arm": cell.arm.name,
            "seed": cell.seed,
            "key": cell.key,
            "state": store.state(cell.key),
            "steps": {name: stage.steps for name, stage in cell.recipe.stage_list()},
            "image_tokens": cell.cost.image_tokens,
            "parameters": cell.cost.parameters,
            "flops": cell.cost.run_flops(cell.recipe),
        }
        for cell in cells
    ]
    return {
        "study": study.name,
        "reference": reference.name,
        "cells": rows,
        "runs": len(unique),
        "missing": sum(store.state(key) != "done" for key in unique),
        "first_stages": len({cell.begins for cell in cells}),
        "seconds": None if seconds is None else round(seconds),
        "workers": workers,
        "rate_from": rate.origin,
    }


def _plan_text(record: dict[str, Any]) -> str:
    rows = [("arm", "seed", "run", "state", "steps", "image tokens", "training FLOPs")]
    for row in record["cells"]:
        steps = ", ".join(
            f"{name} {'by epochs' if count is None else count}"
            for name, count in row["steps"].items()
        )
        flops = "-" if row["flops"] is None else f"{row['flops']:.2e}"
        rows.append(
            (row["arm"], str(row["seed"]), row["key"], row["state"], steps,
             str(row["image_tokens"]), flops)
        )  # fmt: skip
    lines = [
        table(rows),
        f"{record['runs']} runs, {record['missing']} of them missing; {record['first_stages']} "
        f"different first stages; differences are taken from {record['reference']!r}.",
        _time_text(record),
    ]
    return "\n\n".join(lines)


def _time_text(record: dict[str, Any]) -> str:
    from pumice.study.tables import clock

    if record["missing"] == 0:
        return "Nothing is left to run."
    if record["seconds"] is None:
        return "Time: not known, since stages are given in epochs of data that is not counted."
    return (
        f"Time, one run after the other: about {clock(record['seconds'])}, by "
        f"{record['rate_from']}; {record['workers']} at a time."
    )
