"""Adapters (LoRA) kept beside the weights they change, for answering without merging.

Merging reads and changes the whole base, and a quantised base cannot hold the change. Kept, the
base stays as it is and each changed layer adds its low-rank part. Needs no peft.
Shapes: O outputs, I inputs, R rank of the adapter.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from pumice.core.errors import PumiceError
from pumice.models.language import LanguageModel
from pumice.models.lora import Adapter
from pumice.models.quantize import QuantizedLinear


class AdaptedLinear(nn.Module):
    """float[..., I] -> float[..., O]: the layer's own output and scaling * B @ (A @ x).

    Its tensors bear the names that peft gives them: `base_layer`, `lora_A`, `lora_B`.
    """

    def __init__(
        self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype
    ) -> None:
        """base of I inputs and O outputs, a float[R, I], b float[O, R]; kept as `dtype`."""
        super().__init__()
        self.base_layer = base
        self.scaling = scaling
        device = base.weight.device
        self.lora_A = nn.Parameter(a.to(device, dtype), requires_grad=False)
        self.lora_B = nn.Parameter(b.to(device, dtype), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """float[..., I] -> float[..., O]."""
        change = F.linear(F.linear(input, self.lora_A.to(input.dtype)), self.lora_B.to(input.dtype))
        output: torch.Tensor = self.base_layer(input)
        return output + self.scaling * change


def keep_adapter(language: LanguageModel, adapter: Adapter, dtype: torch.dtype) -> None:
    """Puts an adapter on the linear layers it changes, full-precision or quantised ones.

    What it changes that is no linear layer is an error before any layer is touched.
    """
    layers = {name: layer for name, layer in language.model.named_modules()}
    for name, (a, b) in adapter.pairs.items():
        layer = layers.get(name.removesuffix(".weight"))
        if not isinstance(layer, nn.Linear):
            raise PumiceError(
                f"the adapter changes {name}, which is no linear layer of the base model; only "
                f"those can keep one. Open it with the adapter merged (the default)."
            )
        shape = (layer.out_features, layer.in_features)
        if shape != (b.shape[0], a.shape[1]):
            raise PumiceError(
                f"the adapter changes {name} as a ({b.shape[0]}, {a.shape[1]}) weight, and the "
                f"base model's is {shape}. Give the base model that the adapter was trained on"
                f"{f' ({adapter.base})' if adapter.base else ''}."
            )
    for name, (a, b) in adapter.pairs.items():
        path = name.removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        base = layers[path]
        assert isinstance(base, nn.Linear)
        # The input of a quantised layer stays in full precision, and so does what it is changed by.
        kind = torch.float32 if isinstance(base, QuantizedLinear) else dtype
        fresh = AdaptedLinear(base, a, b, adapter.scaling, kind)
        setattr(language.model.get_submodule(parent), leaf, fresh.train(base.training))
