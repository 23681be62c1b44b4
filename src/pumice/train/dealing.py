"""The weights that one process has read, dealt out to those that train with it.

Each process reading the whole model would hold it as many times in a machine's memory as there are
GPUs. Here the main one reads it, and the others get a module's tensors when it is their turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from pumice.core.processes import Processes

if TYPE_CHECKING:
    from pumice.models.lmm import LMM

_Places = Sequence[tuple[nn.Module, str]]


class Dealer:
    """Deals out a model that is whole in the main process and without weights in the others.

    All processes deal the same modules in the same order.
    """

    def __init__(self, lmm: LMM, group: Processes, device: torch.device) -> None:
        """`device` is where the tensors go."""
        from pumice.models.checkpoint import parameter_places

        self._group, self._device = group, device
        self._left: list[_Places] = [places for _, places in parameter_places(lmm)]
        self._left += [
            [(module, leaf)]
            for module in lmm.modules()
            for leaf, _ in module.named_buffers(recurse=False)
        ]
        outline = [_outline(*places[0]) for places in self._left]
        wanted = group.from_main(lambda: outline)
        assert outline == wanted, "the processes built different models"

    @torch.no_grad()
    def deal(self, module: nn.Module) -> None:
        """The parameters and buffers of `module`, but for those that were dealt before."""
        inside = set(module.modules())
        here = [places for places in self._left if places[0][0] in inside]
        self._left = [places for places in self._left if places[0][0] not in inside]
        with self._group.others_there():
            for places in here:
                self._deal(places)

    def _deal(self, places: _Places) -> None:
        module, leaf = places[0]
        own: torch.Tensor = getattr(module, leaf)
        if self._group.is_main:
            tensor = own.detach().to(self._device).contiguous()
        else:
            tensor = torch.empty(own.shape, dtype=own.dtype, device=self._device)
        if tensor.numel():
            # As bytes: gloo does not know every type.
            dist.broadcast(tensor.flatten().view(torch.uint8), src=0)
        if isinstance(own, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=own.requires_grad)
        for module, leaf in places:
            setattr(module, leaf, tensor)


def _outline(module: nn.Module, leaf: str) -> tuple[str, tuple[int, ...], str]:
    tensor: torch.Tensor = getattr(module, leaf)
    return leaf, tuple(tensor.shape), str(tensor.dtype)
