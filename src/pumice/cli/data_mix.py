"""`pumice data mix`: several sources as one file of rows, its counts checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pumice.cli.data_source import check_out
from pumice.cli.options import JsonOption, example
from pumice.cli.output import say, say_json, table


def register(group: typer.Typer) -> None:
    """Add the command to `pumice data`."""
    lines = (
        "pumice data mix mixture.yaml --out train.jsonl",
        "pumice data mix llava15-665k --root playground/data --out playground/data/mix665k.jsonl",
    )
    group.command("mix", epilog=example(*lines))(mix)


def mix(
    file: Annotated[
        str, typer.Argument(metavar="FILE.yaml", help="A mixture file, or a shipped mixture.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.jsonl", help="The file of rows to write.")
    ],
    root: Annotated[
        Path | None,
        typer.Option("--root", metavar="DIR", help="Paths are below it; else beside FILE.yaml."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Draws and orders rows; else as FILE.yaml says.")
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", metavar="NAME", help="A source whose counts may differ."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the rows of several sources as one file.

    Counts that FILE.yaml expects are checked; another count is an error. The record beside --out
    says what came of each source and hashes the ids.
    """
    from pumice.data.mix import write_mix
    from pumice.recipe.mixture import expected, load_mixture

    check_out(out, ".jsonl")
    mixture, home = load_mixture(file)
    home = home if root is None else root
    record = write_mix(
        mixture.parts(home),
        out,
        name=mixture.name,
        seed=mixture.seed if seed is None else seed,
        images=home / mixture.images,
        expected=expected(mixture.expect),
        accept=accept or [],
    )
    if as_json:
        say_json(record)
    else:
        _tell(record, out)


def _tell(record: dict[str, Any], out: Path) -> None:
    rows = [("source", "rows", "with image", "without", "of", "")]
    for name, entry in record["sources"].items():
        state = "accepted" if entry["accepted"] else "as expected" if entry["expected"] else ""
        rows.append((name, *_numbers(entry), f"{entry['rows_there']:,}", state))
    rows.append(("all", *_numbers(record), "", ""))
    say(table(rows))
    say(f"\n{out}: ids {record['ids_sha256'][:12]}, {record['images']:,} different images")


def _numbers(entry: dict[str, Any]) -> tuple[str, str, str]:
    return (
        f"{entry['rows']:,}",
        f"{entry['with_image']:,}",
        f"{entry['without_image']:,}",
    )
