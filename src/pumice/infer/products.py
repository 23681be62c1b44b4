"""Products of a few rows with fixed weights, laid out for the processor.

A single row is bound by how fast its weights come from memory, many rows by arithmetic, and each
wants the weights in another order. One row alone is computed by numpy, which starts an operation in
a third of torch's time. Shapes: N rows, I inputs, O outputs of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from pumice.infer.byte_rows import ByteRows
from pumice.infer.digit_row import DigitRow
from pumice.infer.onednn import BlockedLinear
from pumice.infer.pages import Pages
from pumice.models.quantize import QuantizedLinear, merged

Row = NDArray[np.float32]
"""float[I] or float[O]: what one row is, in numpy."""

# Multiplications below which calling oneDNN costs more than it saves (10 us a call).
_WORTH_A_CALL = 1_500_000
# Weights below which 8 bits save less reading than their product costs in starting (10 us a call).
_WORTH_BYTES = 1 << 18
# Weights from which integers, read as fast as memory gives, make up for their digits (30 us).
_WORTH_DIGITS = 1 << 22


class Product(Protocol):
    """Linear layers that read the same input, as one product."""

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """float[N, I] -> float[N, O], to which `plus`, float[N, O], is added if given."""

    def one(self, x: Row, plus: Row | None = None) -> Row:
        """The same of a single row on the CPU: float[I] -> float[O]."""


class Dense:
    """Plain linear layers, float[O', I] each; `order` says which output of all stands where.

    On the CPU two copies of the weights are made. One row reads large pages, and with at least as
    many outputs as inputs the weights as inputs by outputs, which comes from memory at nearly twice
    the speed; several rows read oneDNN's own blocks, up to twice as fast as the product that
    `F.linear` takes for few rows.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        order: torch.Tensor | None,
        pages: Pages,
    ) -> None:
        weight = _together(weights, order)
        self._bias = _together(biases, order) if biases else None
        self._wide = weight.shape[0] >= weight.shape[1]
        held = pages.copy(weight.t() if self._wide else weight)
        self._weight = held if self._wide else held.t()
        blocked = BlockedLinear.can_hold(weight)
        self._several = BlockedLinear(weight, self._bias) if blocked else None
        self._few = max(1, _WORTH_A_CALL // weight.numel())
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            self._matrix = held.numpy()
            self._added = None if self._bias is None else self._bias.numpy()

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """float[N, I] -> float[N, O], to which `plus`, float[N, O], is added if given."""
        if self._several is not None and x.shape[0] > self._few:
            return self._several(x, plus)
        if plus is None:
            return (
                x @ self._weight if self._bias is None else torch.addmm(self._bias, x, self._weight)
            )
        out = torch.addmm(plus, x, self._weight)
        return out if self._bias is None else out.add_(self._bias)

    def one(self, x: Row, plus: Row | None = None) -> Row:
        """The same of a single row on the CPU: float[I] -> float[O]."""
        out: Row = np.dot(x, self._matrix) if self._wide else np.dot(self._matrix, x)
        if self._added is not None:
            out += self._added
        if plus is not None:
            out += plus
        return out


class Quantized:
    """Quantised linear layers, their outputs side by side, in `order` if given.

    With `pages` int8 layers are held once more as one and, where a single row reads them faster in
    an order of its own, in those again.
    """

    def __init__(
        self,
        layers: Sequence[QuantizedLinear],
        order: torch.Tensor | None,
        pages: Pages | None,
    ) -> None:
        self._rows: ByteRows | DigitRow | None = None
        if pages is not None and all(layer.packed_int8 for layer in layers):
            if len(layers) > 1:
                every = torch.arange(sum(layer.out_features for layer in layers))
                layers, order = [merged(layers, every if order is None else order)], None
            if order is None:
                self._rows = _row_of(layers[0], pages)
        self._layers = layers
        self._order = order

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """float[N, I] -> float[N, O], to which `plus`, float[N, O], is added if given."""
        parts = [layer.forward(x) for layer in self._layers]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self._order is not None:
            out = out[:, self._order]
        return out if plus is None else out.add_(plus)

    def one(self, x: Row, plus: Row | None = None) -> Row:
        """The same of a single row on the CPU: float[I] -> float[O]."""
        if self._rows is None:
            out: Row = self(torch.from_numpy(x).unsqueeze(0)).numpy()[0]
        else:
            out = self._rows(x)
        if plus is not None:
            out += plus
        return out


class Norm:
    """A root-mean-square norm: float[..., D] -> float[..., D].

    torch's own is made of ten operations on the CPU; with the sum as a product these are five.
    """

    def __init__(self, module: Any, order: torch.Tensor | None = None) -> None:
        weight: torch.Tensor = module.weight.detach()
        self._weight = weight if order is None else weight[order]
        self._width = self._weight.shape[0]
        self._mean = weight.new_full((self._width, 1), 1 / self._width)
        self._eps = weight.new_full((1,), module.variance_epsilon)
        self._epsilon = float(module.variance_epsilon)
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            self._factors = self._weight.numpy()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float[..., D] -> float[..., D]."""
        if x.dim() > 2:
            return F.rms_norm(x, self._weight.shape, self._weight, self._epsilon)
        scale = torch.addmm(self._eps, x * x, self._mean).rsqrt_()
        return (x * scale).mul_(self._weight)

    def one(self, x: Row) -> Row:
        """The same of a single row on the CPU: float[D] -> float[D]."""
        out: Row = x * np.float32((float(np.dot(x, x)) / self._width + self._epsilon) ** -0.5)
        out *= self._factors
        return out

    def heads(self, x: Row) -> Row:
        """float[H, D] -> float[H, D], in numpy."""
        sums: Row = np.add.reduce(x * x, -1, keepdims=True)
        out: Row = x / np.sqrt(sums / np.float32(self._width) + np.float32(self._epsilon))
        out *= self._factors
        return out


def product(
    layers: Sequence[nn.Linear],
    pages: Pages,
    order: torch.Tensor | None = None,
    copies: bool = True,
) -> Product:
    """The quickest product of these layers; output `order[k]` of all of them comes k-th.

    Plain layers are copied to `pages` in any case, quantised ones with `copies` alone. Few int8
    weights are held as the float32 numbers that they stand for: their integers would take longer.
    """
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    if not quantized:
        return Dense([layer.weight.detach() for layer in layers], biases, order, pages)
    few = sum(layer.in_features * layer.out_features for layer in layers) < _WORTH_BYTES
    if copies and few and all(layer.packed_int8 for layer in quantized):
        return Dense([layer.dequantized() for layer in quantized], biases, order, pages)
    return Quantized(quantized, order, pages if copies else None)


def _row_of(layer: QuantizedLinear, pages: Pages) -> ByteRows | DigitRow | None:
    if layer.in_features * layer.out_features >= _WORTH_DIGITS:
        return DigitRow(layer)
    return ByteRows.of(layer, pages)


def _together(parts: Sequence[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole if order is None else whole[order]
