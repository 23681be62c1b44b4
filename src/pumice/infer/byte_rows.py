"""A single row times int8 weights, as torch's weighted sum of 8-bit embedding rows.

Row i of a table of weights, inputs by outputs, times input i, added up over all i, is the product;
torch's kernel for it reads whole cache lines in order and multiplies in float32, so the inputs are
not rounded. Its tables have a scale and an offset a row; ours have the same in all rows, and the
scales of outputs come behind. Shapes: I inputs, O outputs, C strips of W outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from pumice.infer.pages import Pages
from pumice.models.quantize import QuantizedLinear

# Outputs that the kernel adds up in registers while it goes through the inputs.
_STRIP = 256
# Its codes have no sign.
_MIDDLE = 128


class ByteRows:
    """The weights of one int8 layer in strips, each inputs by outputs."""

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, pages: Pages
    ) -> None:
        outputs, inputs = codes.shape
        strips = -(-outputs // _STRIP)
        whole = torch.full((strips * _STRIP, inputs), _MIDDLE, dtype=torch.uint8)
        whole[:outputs] = (codes.to(torch.int16) + _MIDDLE).to(torch.uint8)
        ends = torch.tensor([1.0, -_MIDDLE]).view(torch.uint8)
        self._table = pages.empty((strips * inputs, _STRIP + len(ends)), torch.uint8)
        table = self._table.view(strips, inputs, -1)
        table[..., :_STRIP] = whole.view(strips, _STRIP, inputs).transpose(1, 2)
        table[..., _STRIP:] = ends
        self._index = _rows_in_order(strips * inputs)
        self._starts = torch.arange(0, strips * inputs, inputs, dtype=torch.int32)
        self._given = pages.passing(strips * inputs)
        self._strips = self._given.view(strips, inputs).numpy()
        self._scale = scale.numpy()
        self._bias = None if bias is None else bias.detach().float().numpy()

    @classmethod
    def of(cls, layer: QuantizedLinear, pages: Pages) -> Self | None:
        """The same weights again; None where this torch has no such kernel."""
        if not hasattr(torch.ops.quantized, "embedding_bag_byte_rowwise_offsets"):
            return None
        return cls(layer.codes, layer.scale, layer.bias, pages)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """float[I] -> float[O]."""
        self._strips[:] = x
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self._table, self._index, self._starts, False, 0, False, self._given, None, False
        )
        out: NDArray[np.float32] = sums.numpy().reshape(-1)[: len(self._scale)]
        out *= self._scale
        if self._bias is not None:
            out += self._bias
        return out


def _rows_in_order(count: int) -> torch.Tensor:
    """int32[count]: 0, 1, ..."""
    return _power_in_order(max(count - 1, 0).bit_length())[:count]


@cache
def _power_in_order(power: int) -> torch.Tensor:
    # One for all layers, so that it is not read from memory before each.
    return torch.arange(1 << power, dtype=torch.int32)
