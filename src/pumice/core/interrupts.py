"""Ctrl-C for the command line: what Python does, but the end at once while a module is imported.

KeyboardInterrupt within an import comes out as something else, if at all: numpy looks for what is
missing until the stack is full, pybind11 aborts the process, a class reports it as its own fault.
What is half-done then is left as by a kill, from which everything here goes on.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

STOPPED = 130
"""The exit code of a program that Ctrl-C has ended, as shells count."""

_IMPORTING = "<frozen importlib._bootstrap>"


def take_ctrl_c() -> None:
    """From here on; but not where it is ignored, as shells let jobs in the background do."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_ctrl_c)


def ctrl_c_ends() -> bool:
    """Whether Ctrl-C ends the program: nobody has a use of their own for it, or ignores it."""
    return signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _on_ctrl_c)


def _on_ctrl_c(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            os._exit(STOPPED)
        frame = frame.f_back
    raise KeyboardInterrupt
