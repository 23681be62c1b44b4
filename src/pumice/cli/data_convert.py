"""`pumice data convert`: official annotation files to rows of LLaVA's JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pumice.cli.data_source import check_out
from pumice.cli.options import JsonOption, example
from pumice.cli.output import say, say_json, table
from pumice.core.errors import PumiceError


def register(group: typer.Typer) -> None:
    """Add the command to `pumice data`."""
    lines = (
        "pumice data convert --list",
        "pumice data convert vqav2 --annotations questions.json --annotations annotations.json "
        "--images playground/data --out vqav2.json",
        "pumice data convert vg rounds=5 seed=1 --annotations region_descriptions.json "
        "--annotations image_data.json --out vg.json",
    )
    group.command("convert", epilog=example(*lines))(convert)


def convert(
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="A name that --list shows.")
    ] = None,
    rules: Annotated[
        list[str] | None, typer.Argument(metavar="RULE=VALUE", help="Rules to change.")
    ] = None,
    annotations: Annotated[
        list[Path] | None,
        typer.Option("--annotations", metavar="FILE", help="An official file; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A .json or .jsonl file to write.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Where rows find their images; checked."),
    ] = None,
    missing_images: Annotated[
        Literal["error", "drop"], typer.Option(help="What becomes of rows without their image.")
    ] = "error",
    listed: Annotated[
        bool, typer.Option("--list", help="Show the sources, or the rules of SOURCE.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make training rows of official annotation files.

    Rules are those of LLaVA-1.5 unless changed. The report, also written beside --out, counts
    what was read, dropped and changed, by reason.
    """
    if listed:
        _list(source, as_json)
        return
    if source is None or out is None:
        raise PumiceError(
            f"SOURCE is {source} and --out is {out}; both are needed. See "
            f"`pumice data convert --help`, or `--list` for the sources."
        )
    check_out(out, ".json", ".jsonl")
    from pumice.data.academic.convert import convert as make

    report = make(
        source,
        annotations or [],
        out,
        images=images,
        missing_images=missing_images,
        rules=_pairs(rules or []),
    )
    if as_json:
        say_json(report)
    else:
        _tell(report, out)


def _pairs(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in map(_pair, texts):
        if name in found:
            raise PumiceError(
                f"rule {name} is given twice, as {found[name]!r} and {value!r}; leave one out."
            )
        found[name] = value
    return found


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise PumiceError(
            f"the rule {text!r} is not of the form rule=value; write it so, for example rounds=5."
        )
    return name, value


def _list(source: str | None, as_json: bool) -> None:
    from pumice.data.academic import CONVERTERS

    found: dict[str, Any] = {
        name: {
            "about": CONVERTERS[name].about,
            "files": CONVERTERS[name].files,
            "rules": {
                key: {"default": field.default, "about": field.description}
                for key, field in CONVERTERS[name].rules.model_fields.items()
            },
        }
        for name in (CONVERTERS if source is None else [source])
    }
    if as_json:
        say_json({"sources": found})
    elif source is None:
        say(table((name, entry["about"], entry["files"]) for name, entry in found.items()))
    else:
        entry = found[source]
        say(f"{source}: {entry['about']}\nfrom {entry['files']}\n")
        say(table((k, _shown(r["default"]), r["about"]) for k, r in entry["rules"].items()))


def _tell(report: dict[str, Any], out: Path) -> None:
    say(
        f"{report['source']}: {report['read']:,} entries read -> {report['rows']:,} rows with "
        f"{report['rounds']:,} rounds in {out}"
    )
    for what in ("dropped", "changed"):
        for reason, count in report[what].items():
            say(f"  {what} {count:,}: {reason}")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
