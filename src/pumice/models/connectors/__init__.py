"""The shelf of connectors: from vision features to the language model's width.

A new connector is one file here and one line in the table, or a file anywhere that a recipe names
(`own`). A connector maps float[N, P, Dv] -> float[N, Q, D]; `base.Connector` says what it answers
to.
"""

from __future__ import annotations

import re
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.registry import Registry, suggest
from pumice.models.connectors.base import Builder, Connector, Instruction, Sizes
from pumice.models.connectors.cost import ConnectorCost, connector_cost
from pumice.models.connectors.linear import build_linear
from pumice.models.connectors.mlp import build_mlp
from pumice.models.connectors.own import (
    build_own,
    keep_own,
    kept_own,
    named_by_content,
    own_file,
    with_file,
)
from pumice.models.connectors.perceiver import build_perceiver
from pumice.models.connectors.qformer import build_qformer
from pumice.models.connectors.reduction import build_reduced, is_reduction
from pumice.models.connectors.resampler import build_resampler

__all__ = [
    "CONNECTORS",
    "REDUCTIONS",
    "Connector",
    "ConnectorCost",
    "Instruction",
    "build_connector",
    "connector_cost",
    "keep_own",
    "kept_own",
    "named_by_content",
    "own_file",
    "with_file",
]

CONNECTORS: Registry[Builder] = Registry(
    "connector",
    {
        "linear": build_linear,
        "mlpNx_gelu": build_mlp,
        "resampler": build_resampler,
        "qformer": build_qformer,
        "gated_cross_attention": build_perceiver,
    },
)

# Before any of them, with a +: k x k patches become one.
REDUCTIONS = ("shuffle2x2", "average2x2")

_MLP = re.compile(r"mlp[1-9]\d*x_gelu")


def build_connector(
    name: str,
    in_dim: int,
    out_dim: int,
    num_patches: int,
    options: dict[str, Any] | None = None,
    *,
    vocab_size: int,
) -> Connector:
    """A new connector: float[N, num_patches, in_dim] -> float[N, num_tokens, out_dim].

    `options` are the connector's own; `vocab_size` counts the ids an instruction may have.
    """
    sizes = Sizes(in_dim, out_dim, num_patches, vocab_size)
    return _build(name, sizes, dict(options or {}))


def _build(name: str, sizes: Sizes, options: dict[str, Any]) -> Connector:
    if is_reduction(name):
        return build_reduced(name, sizes, options, _build)
    if _MLP.fullmatch(name):
        return CONNECTORS["mlpNx_gelu"](name, sizes, options)
    if own_file(name) is not None:
        return build_own(name, sizes, options)
    if name not in CONNECTORS or name == "mlpNx_gelu":
        merged = [f"{merge}+mlp2x_gelu" for merge in REDUCTIONS]
        near = suggest(name, [known.replace("N", "2") for known in CONNECTORS] + merged)
        raise PumiceError(
            f"connector {name!r} is unknown; known: {', '.join(CONNECTORS.names())} (N layers, "
            f"such as mlp2x_gelu), each also after a merge of patches ({' or '.join(merged)}); "
            f"or the path of a Python file with one of your own (docs/adding.md)."
            f"{near}"
        )
    return CONNECTORS[name](name, sizes, options)
