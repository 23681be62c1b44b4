"""What a connector costs: weights, arithmetic and the image tokens it gives the language model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pumice.models.connectors.base import Connector, Instruction


class ConnectorCost(NamedTuple):
    """The cost of one view."""

    params: int
    """Weights."""
    flops: int
    """Floating point operations of matrix products in one forward pass, 2 a multiplication."""
    tokens: int
    """Positions in the language model."""


def connector_cost(connector: Connector, instruction_tokens: int = 32) -> ConnectorCost:
    """The cost of one view, with an instruction of that many tokens where one is read.

    Nothing is computed: the pass runs on shapes alone.
    """
    sizes = connector.sizes
    state = {**dict(connector.named_parameters()), **dict(connector.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    weight = next(connector.parameters())
    features = torch.empty(1, sizes.num_patches, sizes.in_dim, dtype=weight.dtype, device="meta")
    instruction = None
    if connector.wants_instruction:
        ids = torch.empty(1, instruction_tokens, dtype=torch.long, device="meta")
        instruction = Instruction(ids, torch.empty_like(ids, dtype=torch.bool))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(connector, shapes, (features, None, instruction))
    return ConnectorCost(
        params=sum(parameter.numel() for parameter in connector.parameters()),
        flops=counter.get_total_flops(),
        tokens=connector.num_tokens,
    )
