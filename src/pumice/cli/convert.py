"""`pumice convert`: any model that can be opened, written in any format that can be written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pumice.cli.options import JsonOption, example
from pumice.cli.output import say, say_json, table


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        "convert",
        epilog=example(
            "pumice convert llava-v1.5-7b llava-hf --to hf --vision clip-vit-large-patch14-336",
            "pumice convert runs/pocket/tune pocket-gguf --to gguf --dtype float16",
        ),
    )(convert)


def convert(
    src: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A model directory, or a shipped name."),
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A new directory.")],
    to: Annotated[
        str, typer.Option("--to", help="pumice, hf (transformers, vLLM), llava (SGLang), or gguf.")
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", metavar="DIR", help="Language model of a connector or an adapter alone."
        ),
    ] = None,
    vision: Annotated[
        Path | None,
        typer.Option(
            "--vision", metavar="DIR", help="Vision backbone of a checkpoint that only names it."
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Conversation template, where SRC does not say it."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="float32, bfloat16, float16; for gguf also q8_0, q4_0. As it is if not."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a model and prove that it answers the same.

    SRC is recognised by what lies in it. The proof (largest difference of a logit, greedy tokens)
    is printed and written to DST/parity.json; when it fails, nothing is kept.
    """
    from pumice.convert.convert import convert as run
    from pumice.core.shipped import resolve_model

    report = run(
        resolve_model(src), dst, to, base=base, vision=vision, template=template, dtype=dtype
    )
    if as_json:
        say_json(report)
        return
    say(f"{src} ({report['from']}) -> {dst} ({to})")
    for note in report.get("notes", ()):
        say(f"note: {note}")
    if report["parity"] is not None:
        say(_proof(report["parity"]))


def _proof(parity: dict[str, Any]) -> str:
    rows = [("result", "probe", "positions", "max logit difference", "greedy tokens equal")]
    for against, found in parity.items():
        rows += [
            (
                against,
                row["probe"],
                str(row["positions"]),
                f"{row['max_logit_difference']:.3g}",
                f"{row['tokens_equal']}/{row['tokens']}",
            )
            for row in found["probes"]
        ]
    return table(rows)
