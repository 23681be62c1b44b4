"""How far a long piece of work has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from pumice.core.distributed import is_main

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What the code doing the work sees."""

    def update(self, n: int = 1, **fields: float | int | str) -> None:
        """Counts `n` more done; `fields` such as loss=2.3 are shown beside the count."""


@contextmanager
def progress(total: int | None, title: str) -> Iterator[Progress]:
    """Shows progress on stderr while the block runs; stdout is never touched.

    `total` None means the end is not known. Of several processes only the main one shows it.
    """
    if not is_main():
        yield _Silent()
    elif sys.stderr.isatty():
        with _rich_bar(total, title) as bar:
            yield bar
    else:
        lines = _Lines(total, title)
        try:
            yield lines
        finally:
            lines.close()


class _Silent:
    """Takes the counts and shows nothing."""

    def update(self, n: int = 1, **fields: float | int | str) -> None:
        return None


class _Lines:
    """A plain line at most every ten seconds, and one at the end."""

    def __init__(self, total: int | None, title: str) -> None:
        self.total, self.title = total, title
        self.done = 0
        self.fields: dict[str, float | int | str] = {}
        self.start = self.last_line = time.monotonic()
        self.shown = -1

    def update(self, n: int = 1, **fields: float | int | str) -> None:
        self.done += n
        self.fields.update(fields)
        if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._show()

    def close(self) -> None:
        if self.shown != self.done:
            self._show()

    def _show(self) -> None:
        now = time.monotonic()
        seconds = max(now - self.start, 1e-9)
        speed = self.done / seconds
        parts = [str(self.done)]
        if self.total:
            parts = [f"{self.done}/{self.total} ({100 * self.done // self.total} %)"]
        parts += [f"{speed:.3g}/s", f"{_clock(seconds)} gone"]
        if self.total and 0 < self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / speed)} left")
        parts += _field_texts(self.fields)
        sys.stderr.write(f"{self.title}: {', '.join(parts)}\n")
        sys.stderr.flush()
        self.last_line, self.shown = now, self.done


class _RichBar:
    """A task of a rich progress display."""

    def __init__(self, display: RichProgress, task: TaskID) -> None:
        self.display, self.task = display, task
        self.done = 0
        self.start = time.monotonic()
        self.fields: dict[str, float | int | str] = {}

    def update(self, n: int = 1, **fields: float | int | str) -> None:
        self.done += n
        self.fields.update(fields)
        speed = self.done / max(time.monotonic() - self.start, 1e-9)
        notes = "  ".join([f"{speed:.3g}/s", *_field_texts(self.fields)])
        self.display.update(self.task, advance=n, notes=notes)


@contextmanager
def _rich_bar(total: int | None, title: str) -> Iterator[_RichBar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichDisplay

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[notes]}", markup=False),
    )
    with RichDisplay(*columns, console=Console(stderr=True)) as display:
        yield _RichBar(display, display.add_task(title, total=total, notes=""))


def _field_texts(fields: dict[str, float | int | str]) -> list[str]:
    return [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in fields.items()
    ]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
