"""Linear layers in oneDNN's order of weights, with what follows them in the same pass over memory.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch

# Rows for which oneDNN orders the weights; it orders them for more rows in the same way.
_ROWS = 32


class BlockedLinear:
    """A copy of a layer, float[O, I], on the CPU in float32: up to twice as fast as `F.linear`."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: tuple[str, str] = ("none", ""),
    ) -> None:
        """`activation`: oneDNN's name and variant of it."""
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._bias = bias
        self._name, self._variant = activation

    @staticmethod
    def can_hold(weight: torch.Tensor) -> bool:
        """Whether this torch has such products, and has them for this weight."""
        known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch._C._has_mkldnn
        return known and weight.device.type == "cpu" and weight.dtype == torch.float32

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """float[N, I] -> float[N, O], activated; or with `plus`, float[N, O], added instead."""
        linear = torch.ops.mkldnn._linear_pointwise
        out: torch.Tensor = (
            linear(x, self._blocks, self._bias, self._name, [], self._variant)
            if plus is None
            else linear.binary(x, plus, self._blocks, self._bias, "add")
        )
        return out
