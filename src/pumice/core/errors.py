"""Errors a user can act on. The command line prints them without a traceback and exits with 2.

Every message says what happened, what was given, what is allowed and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class PumiceError(ValueError):
    """Something the user gave cannot be used; the message says how to go on."""


class DataError(PumiceError):
    """A sample, image or data file cannot be used; the message names the sample and the file."""


def some_of(names: Sequence[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are: "a, b (+3 more)"."""
    more = f" (+{len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
