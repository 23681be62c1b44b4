"""Which process this is, read from the variables torchrun sets. Needs no torch."""

from __future__ import annotations

import os

from pumice.core.errors import PumiceError


def rank() -> int:
    """The number of this process, 0 when there is only one."""
    return _whole_number("RANK", default=0)


def local_rank() -> int:
    """The number of this process among those on its machine, 0 when there is only one."""
    return _whole_number("LOCAL_RANK", default=0)


def world_size() -> int:
    """How many processes work together, 1 by default."""
    return _whole_number("WORLD_SIZE", default=1)


def local_world_size() -> int:
    """How many of them are on this machine; where nobody says so, all."""
    return _whole_number("LOCAL_WORLD_SIZE", default=world_size())


def is_main() -> bool:
    """True in the one process that writes files and talks to people."""
    return rank() == 0


def _whole_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise PumiceError(
            f"the environment variable {variable} is {text!r}; a whole number such as {default} is "
            f"allowed. Unset it, or start the program with torchrun, which sets it."
        )
    return int(text)
