"""Arguments and options that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint directory or a shipped name (pocket).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ImagesOption = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="An image file; may be given several times."),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Stop after this many tokens.")
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token (greedy).")
]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this share of probability.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; the best one when left out.")
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="How many requests are answered together.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Ask only this many items, spread evenly.")
]
AllowErrorsOption = Annotated[
    bool, typer.Option("--allow-errors", help="Score the rest although some items are errors.")
]
DataOption = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="Directory of the official files.")
]
ResumeOption = Annotated[
    Literal["auto", "never"],
    typer.Option("--resume", help="auto goes on where a run stopped; never starts again."),
]


def example(*lines: str) -> str:
    """The epilog of a command's help: its examples, kept line by line."""
    return "\b\n" + "\n".join(("Example:", *(f"  {line}" for line in lines)))
