"""Errors a user can act on. The command line prints them without a traceback and exits with 2.

Every message says what happened, what was given, what is allowed and what to do next.
"""


class PumiceError(ValueError):
    """Something the user gave cannot be used; the message says how to go on."""


class DataError(PumiceError):
    """A sample, image or data file cannot be used; the message names the sample and the file."""
