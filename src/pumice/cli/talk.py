"""A conversation in the terminal: what is typed, what is answered, and what is remembered."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import typer

from pumice.cli.output import note, table
from pumice.core.errors import PumiceError
from pumice.core.registry import suggest
from pumice.processing.response_formats import FORMATS, with_format

if TYPE_CHECKING:
    import PIL.Image

    from pumice.core.types import Message, Request, Result, Sampling

    Speak = Callable[[Request], Generator[str, None, Result]]

COMMANDS = {
    "/image FILE": "show the model a picture with the next question",
    "/format NAME": f"ask for a form of answer: {', '.join(FORMATS)}",
    "/reset": "forget the talk and the pictures",
    "/help": "this list",
    "/exit": "leave; so does Ctrl-D",
}
NAMES = tuple(command.split()[0] for command in COMMANDS)
_ALONE = tuple(command for command in COMMANDS if command in NAMES)


class Leave(Exception):
    """The person wants to go."""


@dataclass
class Talk:
    """A conversation so far, and the images that wait for the next question."""

    speak: Speak
    sampling: Sampling
    draw: Callable[[PIL.Image.Image], None] | None = None
    """Shows a picture, where the terminal can."""
    format: str = "none"
    messages: list[Message] = field(default_factory=list)
    waiting: list[bytes] = field(default_factory=list)
    """Files as they were when they were shown: what was talked about stays what it was."""

    def hear(self, line: str) -> None:
        """One line from the person: a command, or a question to stream the answer of.

        KeyboardInterrupt ends an answer, of which the part that was said is kept.
        """
        if not line.startswith("/"):
            self._answer(line)
            return
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest and command in _ALONE:
            raise PumiceError(f"{command} takes nothing behind it ({rest!r:.80}); type it alone.")
        match command:
            case "/image":
                if not rest:
                    raise PumiceError("/image needs a file: /image cat.jpg")
                self.show(_typed_path(rest))
            case "/format":
                self._choose_format(rest)
            case "/reset":
                self.messages.clear()
                self.waiting.clear()
                note("(forgotten)")
            case "/help":
                note(table(COMMANDS.items()))
            case "/exit":
                raise Leave
            case _:
                near = suggest(command, NAMES)
                if os.path.isfile(line):
                    near = f" To show the model that file: /image {line}"
                raise PumiceError(f"{command} is unknown; known: {', '.join(NAMES)}.{near}")

    def show(self, path: Path) -> None:
        """Keep an image for the next question; a file that cannot be read is an error at once."""
        from pumice.core.images import open_image

        picture = open_image(path)
        self.waiting.append(path.read_bytes())
        if self.draw is not None:
            self.draw(picture)
        width, height = picture.size
        note(f"({path}, {width} x {height}: goes with the next question)")

    def _choose_format(self, name: str) -> None:
        if name:
            FORMATS[name]  # an unknown one is an error that names the known ones
            self.format = name
        sentence = FORMATS[self.format].replace("\n", " ")
        note(f"({self.format}: {sentence})" if sentence else "(none: questions go as they are)")

    def _answer(self, line: str) -> None:
        from pumice.core.types import Request, assistant, user

        question = user(with_format(line, self.format), *self.waiting)
        request = Request((*self.messages, question), self.sampling)
        text, result = "", None
        try:
            with closing(self.speak(request)) as pieces:
                while True:
                    try:
                        piece = next(pieces)
                    except StopIteration as end:
                        result = end.value
                        break
                    typer.echo(piece, nl=False)
                    text += piece
        except KeyboardInterrupt:
            # The terminal has written ^C into this line, which no answer ends.
            if not text or not sys.stdout.isatty():
                note("")
            raise
        finally:
            if text:
                typer.echo()
            # An empty answer cannot be part of a conversation: the question is not kept either.
            if text.strip():
                self.messages += [question, assistant(text.strip())]
                self.waiting.clear()
        if not text.strip():
            note("(no answer)")
        if result is not None and result.finish_reason == "length":
            note(f"(cut after {result.new_tokens} tokens; raise --max-new-tokens for more)")


def _typed_path(text: str) -> Path:
    """The file that is meant: as it stands, or as a terminal writes one that is dropped on it.

    Those come in quotes, with backslashes before blanks, or as file:// addresses.
    """
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return Path(path)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    with suppress(ValueError):  # a quote that does not end
        words = shlex.split(text)
        if len(words) == 1:
            return Path(words[0]).expanduser()
    return Path(path)
