"""What every connector is: its sizes, its options, and the call it answers.

Shapes: N views, P features of one view, Dv their width, Q image tokens, D the language model's
width, L instruction tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.registry import suggest


class Instruction(NamedTuple):
    """What each of N views is asked, for the connectors that look at a picture with it in mind."""

    ids: torch.Tensor
    """long[N, L]"""
    mask: torch.Tensor
    """bool[N, L], False on padding"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a connector stands between."""

    in_dim: int
    """Dv, the width of the vision features."""
    out_dim: int
    """D, the width of the language model."""
    num_patches: int
    """P, the features of one view."""
    vocab_size: int
    """The ids an instruction may have."""


class Connector(nn.Module):
    """`forward(float[N, P, Dv], mask bool[N, P] | None, Instruction | None) -> float[N, Q, D]`.

    `mask` says which patches hold picture. The linear layer registered last writes the image
    tokens (`LMM.match_connector_scale` scales it).
    """

    sizes: Sizes
    num_tokens: int
    """Q, the image tokens of one view."""
    side: int | None
    """Tokens stand in a side x side grid in reading order; None when they have no places."""
    options: dict[str, Any]
    """Every option with its value, also those that were left at their defaults."""
    wants_instruction: bool = False

    def describe(
        self, sizes: Sizes, num_tokens: int, side: int | None, options: dict[str, Any]
    ) -> None:
        """Sets what a connector says of itself."""
        self.sizes = sizes
        self.num_tokens = num_tokens
        self.side = side
        self.options = options


Builder = Callable[[str, Sizes, dict[str, Any]], Connector]


def grid_side(num_patches: int) -> int | None:
    """The side of the square grid that P patches make; None when a class token stands with them."""
    side = math.isqrt(num_patches)
    return side if side * side == num_patches else None


def no_options(name: str, options: dict[str, Any]) -> None:
    """Refuses options to a connector that has none."""
    if options:
        raise PumiceError(
            f"connector {name!r} has no options, and {', '.join(map(repr, options))} was given. "
            f"Leave connector_options out, or choose a connector that has options (resampler, "
            f"qformer, gated_cross_attention)."
        )


Options = TypeVar("Options")


def read_options(kind: type[Options], name: str, options: dict[str, Any]) -> Options:
    """Options as the frozen dataclass `kind`; unknown names and unfit values are errors.

    A field's metadata may hold `least` (of numbers; else 1 for whole ones) and `choices`. A
    default of None stands for a whole number that follows from something else.
    """
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    for key, value in options.items():
        if key not in known:
            raise PumiceError(
                f"connector {name!r} has no option {key!r}; its options are "
                f"{', '.join(known)}.{suggest(key, known)}"
            )
        entry = known[key]
        assert entry.default is not MISSING
        wanted = _misfit(value, entry.default, entry.metadata)
        if wanted:
            raise PumiceError(
                f"option {key} of connector {name!r} is {value!r}; {wanted} is needed."
            )
    return kind(**options)


def options_dict(options: Any) -> dict[str, Any]:
    """The options of `read_options` as plain JSON types."""
    return asdict(options)


def _misfit(value: Any, default: Any, metadata: Any) -> str:
    """What would be needed instead of `value`; "" when it fits."""
    if value is None and default is None:
        return ""
    choices = metadata.get("choices")
    if choices:
        return "" if value in choices else " or ".join(map(repr, choices))
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, float):
        least, below = metadata.get("least", 0.0), metadata.get("below", math.inf)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        limit = f" and less than {below:g}" if below < math.inf else ""
        return "" if fits and least <= value < below else f"a number of at least {least:g}{limit}"
    least = metadata.get("least", 1)
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return "" if fits else f"a whole number of at least {least}"
