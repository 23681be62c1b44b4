"""Products of a few rows with fixed weights, laid out for the processor.

A single row is bound by how fast its weights come from memory, many rows by arithmetic, and each
wants the weights in another order. Shapes: N rows, I inputs, O outputs of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from pumice.models.quantize import QuantizedLinear, merged

# Rows for which oneDNN orders the weights; it orders them for more rows in the same way.
_ROWS = 32
# Multiplications below which calling oneDNN costs more than it saves (10 us a call).
_WORTH_A_CALL = 1_500_000


class Product(Protocol):
    """Linear layers that read the same input, as one product."""

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """float[N, I] -> float[N, O], to which `plus`, float[N, O], is added if given."""


class Dense:
    """Plain linear layers; `order` says which output of all of them stands where.

    On the CPU two copies of the weights are made: for one row and a wide product the weights as
    inputs by outputs, which comes from memory at nearly twice the speed, and for several rows
    oneDNN's own blocks, up to twice as fast as the product that `F.linear` takes for few rows.
    """

    def __init__(self, layers: Sequence[nn.Linear], order: torch.Tensor | None = None) -> None:
        weight = _together([layer.weight.detach() for layer in layers], order)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self._bias = _together(biases, order) if biases else None
        wide = weight.shape[0] > weight.shape[1]
        self._weight = weight.t().contiguous() if wide else weight.t()
        self._blocks = _blocks(weight)
        self._few = max(1, _WORTH_A_CALL // weight.numel())

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """float[N, I] -> float[N, O], to which `plus`, float[N, O], is added if given."""
        if self._blocks is not None and x.shape[0] > self._few:
            return _several(x, self._blocks, self._bias, plus)
        if plus is None:
            return (
                x @ self._weight if self._bias is None else torch.addmm(self._bias, x, self._weight)
            )
        # One row as a vector: of a tall matrix MKL reads more in a second so.
        out = (
            torch.addmv(plus[0], self._weight.t(), x[0]).unsqueeze(0)
            if x.shape[0] == 1
            else torch.addmm(plus, x, self._weight)
        )
        return out if self._bias is None else out.add_(self._bias)


class Quantized:
    """Quantised linear layers, their outputs side by side, in `order` if given.

    With `copies`, several int8 layers are held once more, as one.
    """

    def __init__(
        self,
        layers: Sequence[QuantizedLinear],
        order: torch.Tensor | None = None,
        copies: bool = True,
    ) -> None:
        if copies and len(layers) > 1 and all(layer.packed_int8 for layer in layers):
            every = torch.arange(sum(layer.out_features for layer in layers))
            layers, order = [merged(layers, every if order is None else order)], None
        self._layers = layers
        self._order = order

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """float[N, I] -> float[N, O], to which `plus`, float[N, O], is added if given."""
        parts = [layer.forward(x) for layer in self._layers]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self._order is not None:
            out = out[:, self._order]
        return out if plus is None else out.add_(plus)


class Norm:
    """A root-mean-square norm: float[..., D] -> float[..., D].

    torch's own is made of ten operations on the CPU; with the sum as a product these are five.
    """

    def __init__(self, module: Any, order: torch.Tensor | None = None) -> None:
        weight: torch.Tensor = module.weight.detach()
        self._weight = weight if order is None else weight[order]
        width = self._weight.shape[0]
        self._mean = weight.new_full((width, 1), 1 / width)
        self._eps = weight.new_full((1,), module.variance_epsilon)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float[..., D] -> float[..., D]."""
        if x.dim() > 2:
            return F.rms_norm(x, self._weight.shape, self._weight, float(self._eps))
        scale = torch.addmm(self._eps, x * x, self._mean).rsqrt_()
        return (x * scale).mul_(self._weight)


def product(
    layers: Sequence[nn.Linear], order: torch.Tensor | None = None, copies: bool = True
) -> Product:
    """The quickest product of these layers; output `order[k]` of all of them comes k-th.

    Plain layers are copied in any case, quantised ones with `copies` alone.
    """
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    return Quantized(quantized, order, copies) if quantized else Dense(layers, order)


def _together(parts: Sequence[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole if order is None else whole[order]


def _blocks(weight: torch.Tensor) -> torch.Tensor | None:
    """The weights in oneDNN's order; None where this torch or this device has no such product."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch._C._has_mkldnn
    if not known or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    blocks: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return blocks


def _several(
    x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None, plus: torch.Tensor | None
) -> torch.Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    out: torch.Tensor = (
        linear(x, blocks, bias, "none", [], "")
        if plus is None
        else linear.binary(x, plus, blocks, bias, "add")
    )
    return out
