"""`pumice chat`: a conversation in the terminal, the answers streamed."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pumice.cli.options import (
    LOADING,
    SAMPLING,
    ImagesOption,
    LoadOptions,
    ModelArg,
    SamplingOptions,
    example,
    with_option_groups,
)
from pumice.cli.output import fail, note
from pumice.core.errors import PumiceError
from pumice.core.registry import suggest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pumice.core.types import Message, Sampling
    from pumice.infer.model import Model

_COMMANDS = ("/image", "/reset")
_HINT = "/image FILE shows the model a picture, /reset forgets the talk, an empty line ends it."


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("chat", epilog=example("pumice chat pocket --image cat.jpg"))(
        with_option_groups(chat)
    )


def chat(
    model: ModelArg,
    images: ImagesOption = None,
    sampling: SamplingOptions = SAMPLING,
    loading: LoadOptions = LOADING,
) -> None:
    """Talk with a model in the terminal.

    /image FILE shows it a picture, /reset forgets the talk; an empty line or the end of the input
    ends it.
    """
    from pumice.core.types import Sampling
    from pumice.infer.model import load

    talk = Talk(load(model, **asdict(loading)), Sampling(**asdict(sampling)))
    for path in images or []:
        talk.show(path)
    note(_HINT)
    for line in _lines():
        try:
            talk.hear(line)
        except PumiceError as error:
            fail(str(error))


@dataclass
class Talk:
    """A conversation so far, and the images that wait for the next question."""

    model: Model
    sampling: Sampling
    messages: list[Message] = field(default_factory=list)
    waiting: list[Path] = field(default_factory=list)

    def hear(self, line: str) -> None:
        """One line from the person: a command, or a question to stream the answer of."""
        if not line.startswith("/"):
            self._answer(line)
            return
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self.messages.clear()
            self.waiting.clear()
            note("(forgotten)")
        elif command == "/image" and rest.strip():
            self.show(Path(rest.strip()).expanduser())
        elif command == "/image":
            raise PumiceError("/image needs a file: /image cat.jpg")
        else:
            near = suggest(command, _COMMANDS)
            raise PumiceError(f"{command} is unknown; known: {', '.join(_COMMANDS)}.{near}")

    def show(self, path: Path) -> None:
        """Keep an image for the next question; a file that cannot be read is an error at once."""
        from pumice.core.images import open_image

        width, height = open_image(path).size
        self.waiting.append(path)
        note(f"({path}, {width} x {height}: goes with the next question)")

    def _answer(self, line: str) -> None:
        from pumice.core.types import Request, assistant, user

        question = user(line, *self.waiting)
        text = ""
        try:
            for delta in self.model.stream(Request((*self.messages, question), self.sampling)):
                typer.echo(delta, nl=False)
                text += delta
        finally:
            if text:
                typer.echo()
        self.waiting.clear()
        # An empty answer cannot be part of a conversation: the question is not kept either.
        if text.strip():
            self.messages += [question, assistant(text.strip())]


def _lines() -> Iterator[str]:
    """What the person types, until an empty line or the end; also from a pipe."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            # On stderr, so that stdout holds the answers alone.
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
