"""`pumice data verify`: every row and image of training data, before it costs a training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pumice.cli.data_source import (
    FileArg,
    ImagesDirOption,
    KindOption,
    ModelOption,
    Reader,
    RecipeOption,
    StageOption,
    check_images,
    check_out,
    reader_of,
)
from pumice.cli.options import JsonOption, example
from pumice.cli.output import note, say, say_json, table
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.data.findings import Report

_SHOWN = 5


def register(group: typer.Typer) -> None:
    """Add the command to `pumice data`."""
    lines = (
        "pumice data verify train.json --images images --recipe pocket",
        "pumice data verify train.json --images images --evaluation val2014 "
        "--policy drop --out clean.json",
    )
    group.command("verify", epilog=example(*lines))(verify)


PolicyOption = Annotated[
    Literal["error", "drop", "report"],
    typer.Option(
        "--policy",
        help="error: exit with 1 if a row is bad. drop: write --out without bad rows. report.",
    ),
]
EvaluationOption = Annotated[
    list[Path] | None,
    typer.Option("--evaluation", metavar="DIR", help="Images no row may show; repeatable."),
]
MaxTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Longest conversation; else the model's or recipe's.")
]
ManifestOption = Annotated[
    Path | None,
    typer.Option("--manifest", metavar="PATH", help="Every finding; else FILE.verify.jsonl."),
]
IgnoreOption = Annotated[
    list[str] | None, typer.Option("--ignore", metavar="KIND", help="Do not report this kind.")
]


def verify(
    file: FileArg,
    images: ImagesDirOption = None,
    policy: PolicyOption = "error",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where drop writes the good rows.")
    ] = None,
    evaluation: EvaluationOption = None,
    model: ModelOption = None,
    recipe: RecipeOption = None,
    stage: StageOption = None,
    max_tokens: MaxTokensOption = None,
    ignore: IgnoreOption = None,
    manifest: ManifestOption = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest image.")] = None,
    kind: KindOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every row and image of training data.

    Nothing is changed or replaced: bad rows are named, and with --policy drop left out of a copy.
    Lengths are checked when --model or --recipe says how rows are read.
    """
    from pumice.data.findings import KINDS
    from pumice.data.open_source import open_source
    from pumice.data.verify import VerifySpec
    from pumice.data.verify import verify as check
    from pumice.data.verify_files import (
        manifest_path,
        write_clean,
        write_clean_manifest,
        write_manifest,
    )

    for name in ignore or []:
        KINDS[name]
    _check_options(policy, out, evaluation or [], max_tokens, model or recipe)
    _check_paths(file, images, out)
    reader = reader_of(model, recipe, stage)
    spec = VerifySpec(
        evaluation=tuple(evaluation or ()),
        ignore=frozenset(ignore or ()),
        **_limits(reader, max_tokens, max_pixels),
    )
    source = open_source(file, images, kind=kind)
    report = check(source, spec)
    applied: dict[str, Any] = {"policy": policy, "read_with": reader.name if reader else None}
    path = manifest or manifest_path(file)
    write_manifest(path, report, applied)  # Before a copy, of which nothing may be left.
    if policy == "drop" and out is not None:
        left = write_clean(source, report.bad_rows, out)
        write_clean_manifest(out, left, report, applied)
        applied |= {"clean_file": str(out), "clean_rows": left}
        write_manifest(path, report, applied)
    if as_json:
        say_json(report.summary() | applied | {"manifest": str(path)})
    else:
        _tell(report, applied, path)
    if policy == "error" and report.bad_rows:
        raise typer.Exit(1)


def _check_options(
    policy: str, out: Path | None, evaluation: list[Path], max_tokens: int | None, eyes: str | None
) -> None:
    if (policy == "drop") != (out is not None):
        given = "without --out" if out is None else f"with --out {out}"
        raise PumiceError(
            f"--policy {policy} was given {given}; --out names the file that --policy drop writes. "
            f"Give both or neither."
        )
    for folder in evaluation:
        if not folder.exists():
            raise PumiceError(
                f"--evaluation {folder} does not exist; a directory of images is needed. Check it."
            )
    if max_tokens is not None and eyes is None:
        raise PumiceError(
            f"--max-tokens {max_tokens} needs a tokenizer to count with. Add --model or --recipe."
        )


def _check_paths(file: Path, images: Path | None, out: Path | None) -> None:
    from pumice.data.verify_files import refuse_same

    check_images(images)
    if out is not None:
        check_out(out)
        refuse_same(file, out)


def _limits(
    reader: Reader | None, max_tokens: int | None, max_pixels: int | None
) -> dict[str, Any]:
    limits: dict[str, Any] = {} if max_pixels is None else {"max_pixels": max_pixels}
    if reader is None:
        return limits
    limit = max_tokens or reader.max_tokens
    count = partial(reader.processor.encode, max_tokens=limit, pixels=False)
    return limits | {"count_tokens": count, "max_tokens": limit}


def _tell(report: Report, applied: dict[str, Any], path: Path) -> None:
    from pumice.data.findings import KINDS

    say(f"{report.file}: {report.rows:,} rows, {report.images:,} images, {report.seconds:.1f} s")
    counts = report.counts()
    if counts:
        rows = [("kind", "", "rows", "for example")]
        for name, count in counts.items():
            first = next(finding for finding in report.findings if finding.kind == name)
            example_ = (
                first.reason if first.place in first.reason else f"{first.place}: {first.reason}"
            )
            rows.append((name, KINDS[name].severity, f"{count:,}", _short(example_)))
        say("\n" + table(rows))
    bad = len(report.bad_rows)
    say(f"\n{bad:,} row{'s' * (bad != 1)} with errors" if bad else "\nno errors")
    if "clean_file" in applied:
        say(f"{applied['clean_file']}: the {applied['clean_rows']:,} rows without errors")
    say(f"every finding: {path}")
    if report.unread:
        named = ", ".join(report.unread[:_SHOWN])
        note(f"{len(report.unread)} evaluation images cannot be read, such as {named}")
    if report.checked["max_tokens"] is None:
        note("lengths were not checked: --model or --recipe says how rows are read")


def _short(text: str, limit: int = 150) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
