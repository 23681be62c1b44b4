"""What a command says: its result on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from pumice.core.files import HALVES


def say(text: str) -> None:
    """A result line on stdout."""
    typer.echo(_written(text))


def say_json(value: dict[str, Any]) -> None:
    """The one JSON object of a `--json` run on stdout. Numbers that are not finite become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, indent=2, allow_nan=False)
    typer.echo(_written(text))


def _written(text: str) -> str:
    """Halves of characters, as the names of files may hold, escaped; stderr does so by itself."""
    return text.encode("utf-8", HALVES).decode()


def note(text: str) -> None:
    """A remark for the person at the terminal, on stderr."""
    typer.echo(text, err=True)


def fail(message: str) -> None:
    """The one block of an error, on stderr."""
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as aligned text columns; the last column is not padded."""
    cells = [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and (value != value or value in {float("inf"), float("-inf")}):
        return None
    return value
