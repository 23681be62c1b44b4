"""One logger for the package: silent in a library, lines on stderr once the command line asks."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import TracebackType

from pumice.core.distributed import is_main, rank

ROOT = "pumice"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; call it with `__name__`."""
    return logging.getLogger(name if name.split(".")[0] == ROOT else f"{ROOT}.{name}")


def setup_logging(verbosity: int = 0) -> None:
    """Sends the log to stderr: -1 warnings only, 0 notes as well, 1 and more everything.

    Only the command line calls this; a program that imports pumice keeps its own logging.
    """
    # Of several processes the main one tells how it goes; what is wrong, each says itself.
    level = logging.WARNING if verbosity < 0 or not is_main() else logging.INFO
    logger = logging.getLogger(ROOT)
    logger.setLevel(logging.DEBUG if verbosity > 0 else level)
    # A second call replaces the first one's handler, so that no line appears twice.
    for old in [handler for handler in logger.handlers if handler.get_name() == ROOT]:
        logger.removeHandler(old)
    handler = _terminal_handler() if sys.stderr.isatty() else _plain_handler()
    handler.set_name(ROOT)
    handler.setLevel(logging.DEBUG if verbosity > 0 else level)
    logger.addHandler(handler)


class LogOfProcess:
    """While it is open, the log of this process also goes to `folder/rank-K.log`, with times.

    An exception that ends the block is written there too, before it goes on.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(folder / f"rank-{rank()}.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger = logging.getLogger(ROOT)
        self._level = self._logger.level

    def __enter__(self) -> LogOfProcess:
        self._logger.setLevel(min(self._level or logging.INFO, logging.INFO))
        self._logger.addHandler(self._handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and error is not None:
            text, found = "the process ends by an exception", (kind, error, trace)
            record = self._logger.makeRecord(ROOT, logging.ERROR, __file__, 0, text, (), found)
            self._handler.handle(record)
        self._logger.removeHandler(self._handler)
        self._handler.close()
        self._logger.setLevel(self._level)


def _plain_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    return handler


def _terminal_handler() -> logging.Handler:
    # Imported here because rich costs start-up time that a plain run should not pay.
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
