"""What is told when a command is given more arguments than it takes: which, and what was meant."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    import typer

# The usual ones: what else is an image is told by the option's own check.
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_FREE_TEXT = "TEXT"


class Command(TyperCommand):
    """A command of ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does it, but with a word on what is too much."""
        given = list(args)
        ctx.allow_extra_args = True
        extra = super().parse_args(ctx, args)
        if extra:
            ctx.fail(_too_many(self, ctx, given, extra))
        return extra


def help_extra_arguments(app: typer.Typer) -> None:
    """Makes every command below one of ours."""
    for command in app.registered_commands:
        command.cls = Command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            help_extra_arguments(group.typer_instance)


def _too_many(command: Command, ctx: Any, args: Sequence[str], extra: Sequence[str]) -> str:
    taken = {
        str(param.metavar or param.name): str(ctx.params[param.name])
        for param in command.params
        if param.param_type_name == "argument"
    }
    takes = " ".join(taken) or "options alone"
    here = f" (here {', '.join(f'{name} is {text!r}' for name, text in taken.items())})"
    told = (
        f"{_listed(extra)}: too many arguments; {ctx.command_path} takes {takes}"
        f"{here if taken else ''}. "
    )
    has_images = any("--image" in param.opts for param in command.params)
    meant = _meant(list(taken), [*taken.values(), *extra], has_images)
    if meant is None:
        return f"{told}Put what has blanks in quotes, and everything else after its option."
    # The options that were given stay as they are.
    words = [*ctx.command_path.split(), *meant, *_without([*taken.values(), *extra], args)]
    return f"{told}Did you mean: {shlex.join(words)}"


def _meant(names: Sequence[str], given: Sequence[str], has_images: bool) -> list[str] | None:
    """Arguments and images as the command takes them; None where that cannot be guessed."""
    images = [word for word in given if has_images and PurePath(word).suffix.lower() in _IMAGES]
    words = _without(images, given)
    if names[-1:] == [_FREE_TEXT] and len(words) >= len(names):
        first = len(names) - 1
        words = [*words[:first], " ".join(words[first:])]
    if len(words) != len(names):
        return None
    return [*words, *(part for image in images for part in ("--image", image))]


def _without(some: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words but for each of `some` once."""
    left = list(words)
    for word in some:
        if word in left:
            left.remove(word)
    return left


def _listed(words: Sequence[str]) -> str:
    return " ".join(repr(word) for word in words)
