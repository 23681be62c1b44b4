"""The shelf of connectors: from vision features to the language model's width.

A new connector is one file here and one line in the table. A connector maps
float[N, P, Dv] -> float[N, Q, D] and has `num_tokens`, its Q.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.registry import Registry, suggest
from pumice.models.connectors.linear import build_linear
from pumice.models.connectors.mlp import build_mlp

Builder = Callable[[str, int, int, int], nn.Module]

CONNECTORS: Registry[Builder] = Registry(
    "connector",
    {
        "linear": build_linear,
        "mlpNx_gelu": build_mlp,
    },
)

_MLP = re.compile(r"mlp[1-9]\d*x_gelu")


def build_connector(name: str, in_dim: int, out_dim: int, num_patches: int) -> nn.Module:
    """A new connector: float[N, num_patches, in_dim] -> float[N, num_tokens, out_dim]."""
    if _MLP.fullmatch(name):
        return CONNECTORS["mlpNx_gelu"](name, in_dim, out_dim, num_patches)
    if name not in CONNECTORS or name == "mlpNx_gelu":
        near = suggest(name, ("linear", "mlp2x_gelu"))
        raise PumiceError(
            f"connector {name!r} is unknown; known: {', '.join(CONNECTORS.names())} (N layers, "
            f"such as mlp2x_gelu).{near}"
        )
    return CONNECTORS[name](name, in_dim, out_dim, num_patches)
