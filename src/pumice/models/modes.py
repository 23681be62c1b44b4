"""Evaluation mode for a while, in whatever modes the parts of a model were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """While it lasts, no part of `module` is in training mode; afterwards those that were are."""
    # Part by part: a stage sets the parts that learn, and the whole may say something else.
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
