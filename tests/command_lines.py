"""Command lines of help texts and documents: do they parse, without being run?"""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer
import typer.main

from pumice.cli.app import app

TREE: Any = typer.main.get_command(app)
# typer does not export the base class of everything that can be wrong in a command line.
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]


def leaves() -> list[tuple[str, ...]]:
    """Every command that does something, as the words one types."""
    found: list[tuple[str, ...]] = []
    for name, command in TREE.commands.items():
        below = getattr(command, "commands", None)
        found += [(name, sub) for sub in below] if below else [(name,)]
    return found


def parse(line: str) -> str:
    """Parse `pumice ...` as the program would, running nothing; gives the command's name.

    An unknown command or option, or a missing argument, is an AssertionError.
    """
    try:
        return _parse(shlex.split(line, comments=True))
    except USAGE_ERROR as error:
        raise AssertionError(f"{line}: {error}") from error


def _parse(words: list[str]) -> str:
    assert words[0] == "pumice", words
    context = TREE.make_context("pumice", words[1:])
    command, names = TREE, ["pumice"]
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            break
        name, command, rest = command.resolve_command(context, rest)
        names.append(name)
        context = command.make_context(name, rest, parent=context)
    return " ".join(names)


def examples(help_text: str) -> list[str]:
    """The commands below "Example:" in a help text."""
    _, _, block = help_text.partition("Example:\n")
    return [line.strip() for line in block.splitlines() if line.strip().startswith("pumice ")]


def code_blocks(markdown: str, language: str) -> list[str]:
    """The content of every fenced block of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
