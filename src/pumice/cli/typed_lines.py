"""Lines that a person types, with history and completion, or that come through a pipe."""

from __future__ import annotations

import glob
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from pumice.cli.output import note
from pumice.core.files import cache_dir

_PROMPT = "> "
_HISTORY_LINES = 1000


class TypedLines:
    """What is typed, line by line without blank ones, until Ctrl-D or the end of the input.

    On a terminal Ctrl-C forgets the line, and a second one in a row ends. One that stopped
    something else counts as the first where `interrupted` is set.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands
        self.by_hand = sys.stdin.isatty()
        self.interrupted = False

    def __iter__(self) -> Generator[str]:
        if not self.by_hand:
            yield from (line.strip() for line in sys.stdin if line.strip())
            return
        with _editing(self._commands):
            while (line := self._next()) is not None:
                if line.strip():
                    yield line.strip()

    def _next(self) -> str | None:
        try:
            line = _ask()
        except EOFError:
            note("")
            return None
        except KeyboardInterrupt:
            if self.interrupted:
                note("")
                return None
            self.interrupted = True
            note("\n(Ctrl-C again to leave)")
            return ""
        self.interrupted = False
        return line


def _ask() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    # On stderr, so that a file which stdout leads to holds the answers alone.
    typer.echo(_PROMPT, nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


@contextmanager
def _editing(commands: Sequence[str]) -> Iterator[None]:
    """Arrow keys, a history that outlives the process, and Tab for commands and files."""
    try:
        import readline
    except ImportError:  # not on every system
        yield
        return
    history = cache_dir() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(_HISTORY_LINES)
    readline.set_completer_delims("")
    readline.set_completer(lambda text, state: _completed(text, state, commands))
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        try:
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
        except OSError as error:
            note(f"(the history is not kept: {error.strerror})")


def _completed(text: str, state: int, commands: Sequence[str]) -> str | None:
    """The completion number `state` of a line: a command, or the file behind /image."""
    head, space, name = text.partition(" ")
    if not space:
        # Python's readline puts no blank behind a word, which a file's name needs.
        found = [f"{command} " for command in commands if command.startswith(head)]
    elif head == "/image":
        paths = sorted(glob.glob(glob.escape(str(Path(name).expanduser())) + "*"))
        found = [f"{head} {path}{'/' * Path(path).is_dir()}" for path in paths]
    else:
        found = []
    return found[state] if state < len(found) else None
