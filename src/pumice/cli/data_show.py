"""`pumice data show`: samples as the model reads them, in the terminal and as a page."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli.data_source import (
    FileArg,
    ImagesDirOption,
    KindOption,
    ModelOption,
    RecipeOption,
    StageOption,
    check_images,
    reader_of,
)
from pumice.cli.options import JsonOption, example
from pumice.cli.output import say, say_json
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    import PIL.Image
    from rich.text import Text

    from pumice.data.show import Shown

# Columns of a picture in the terminal; a character shows two pixels, one above the other.
_COLUMNS = 40
_DEFAULT_MODEL = "pocket"


def register(group: typer.Typer) -> None:
    """Add the command to `pumice data`."""
    lines = (
        "pumice data show train.json --images images --n 3",
        "pumice data show train.json --images images --recipe llava15-7b --html samples.html",
    )
    group.command("show", epilog=example(*lines))(show)


def show(
    file: FileArg,
    images: ImagesDirOption = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many, evenly spread.")] = 5,
    row: Annotated[
        list[int] | None,
        typer.Option("--row", min=1, metavar="N", help="This row, from 1; repeatable."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a page of them.")
    ] = None,
    model: ModelOption = None,
    recipe: RecipeOption = None,
    stage: StageOption = None,
    kind: KindOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show samples with their images, learnt tokens coloured.

    Rows are read as --model or --recipe reads them (the pocket model when both are left out).
    """
    from pumice.core.files import write_atomic
    from pumice.data.open_source import open_source
    from pumice.data.show import shown, spread_rows
    from pumice.data.show_html import samples_page

    check_images(images)
    reader = reader_of(model, recipe, stage) or reader_of(_DEFAULT_MODEL, None, None)
    assert reader is not None
    source = open_source(file, images, kind=kind)
    if row and max(row) > len(source):
        raise PumiceError(
            f"--row {max(row)} was given, but {file} has {len(source)} rows. Give a number from 1 "
            f"to {len(source)}."
        )
    chosen = [number - 1 for number in row] if row else spread_rows(len(source), n)
    samples = [shown(source[number], reader.processor) for number in chosen]
    if html is not None:
        write_atomic(html, samples_page(str(file), samples, reader.name))
    if as_json:
        found = [sample.to_dict() for sample in samples]
        say_json({"file": str(file), "read_with": reader.name, "samples": found})
    elif html is not None:
        say(str(html))
    else:
        for sample in samples:
            say(_in_terminal(sample))


def _in_terminal(sample: Shown) -> str:
    """Colours and pictures on a terminal; elsewhere learnt text stands between marks."""
    from rich.console import Console
    from rich.text import Text

    colours = sys.stdout.isatty()
    head = f"{sample.id} ({sample.source}): {sample.tokens} tokens, {sample.learned} learnt"
    text = Text(head + "\n", style="bold")
    for number, image in enumerate(sample.images, start=1):
        if colours:
            text.append_text(_drawn(image))
        text.append(f"image {number}: {image.width} x {image.height}\n", style="dim")
    for run in sample.runs():
        if run.image is not None:
            text.append(f"[image {run.image}: {run.tokens} tokens]", style="not bold cyan")
        elif run.learned:
            text.append(run.text if colours else f"\u00ab{run.text}\u00bb", style="not bold green")
        else:
            text.append(run.text, style="not bold dim")
    # Into a string, so that every result leaves by the same door.
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=colours, soft_wrap=True, highlight=False)
    console.print(text)
    return buffer.getvalue()


def _drawn(image: PIL.Image.Image) -> Text:
    """A picture in half blocks: the upper pixel as the colour of the sign, the lower behind it."""
    import numpy as np
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    rows = max(1, round(_COLUMNS * image.height / image.width / 2))
    pixels = np.asarray(image.resize((_COLUMNS, rows * 2)))
    text = Text()
    for y in range(0, rows * 2, 2):
        for x in range(_COLUMNS):
            upper, lower = (Color.from_rgb(*pixels[y + k, x].tolist()) for k in (0, 1))
            text.append("\u2580", style=Style(color=upper, bgcolor=lower, bold=False))
        text.append("\n")
    return text
