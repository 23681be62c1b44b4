"""A single row times many int8 weights, in integers: each input is two digits of 7 bits.

FBGEMM multiplies whole rows of 8 bits, four inputs at a time, and so reads as fast as memory gives;
starting it costs more than `byte_rows.ByteRows`, which goes through the weights in float32. The
digits are those that `QuantizedLinear` gives several rows, in numpy: a third of torch's operations'
time. Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pumice.models.quantize import DIGIT, DIGIT_BASE, QuantizedLinear


class DigitRow:
    """A packed int8 layer, for one row."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self._layer = layer
        self._given = torch.empty(2, layer.in_features)
        self._digits = self._given.numpy()
        self._bias = None if layer.bias is None else layer.bias.detach().float().numpy()

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """float[I] -> float[O]."""
        high, rest = self._digits
        largest = max(float(np.maximum.reduce(x)), -float(np.minimum.reduce(x)), 1e-30)
        np.multiply(x, np.float32(DIGIT / largest), out=rest)
        np.rint(rest, out=high)
        rest -= high
        rest *= np.float32(DIGIT_BASE)
        sums: NDArray[np.float32] = self._layer.digit_sums(self._given).numpy()
        sums[1] *= np.float32(1 / DIGIT_BASE)
        out: NDArray[np.float32] = sums[0]
        out += sums[1]
        out *= np.float32(largest / DIGIT)
        if self._bias is not None:
            out += self._bias
        return out
