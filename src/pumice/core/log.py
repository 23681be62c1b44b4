"""One logger for the package: silent in a library, lines on stderr once the command line asks."""

from __future__ import annotations

import logging
import sys

ROOT = "pumice"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; call it with `__name__`."""
    return logging.getLogger(name if name.split(".")[0] == ROOT else f"{ROOT}.{name}")


def setup_logging(verbosity: int = 0) -> None:
    """Sends the log to stderr: -1 warnings only, 0 notes as well, 1 and more everything.

    Only the command line calls this; a program that imports pumice keeps its own logging.
    """
    level = logging.WARNING if verbosity < 0 else logging.INFO
    logger = logging.getLogger(ROOT)
    logger.setLevel(logging.DEBUG if verbosity > 0 else level)
    # A second call replaces the first one's handler, so that no line appears twice.
    for old in [handler for handler in logger.handlers if handler.get_name() == ROOT]:
        logger.removeHandler(old)
    handler = _terminal_handler() if sys.stderr.isatty() else _plain_handler()
    handler.set_name(ROOT)
    logger.addHandler(handler)


def _plain_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    return handler


def _terminal_handler() -> logging.Handler:
    # Imported here because rich costs start-up time that a plain run should not pay.
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
