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
from pumice.models.lora import Adapter, adapter_parameters, merged_weight
from pumice.models.quantize import QuantizedLinear


class AdaptedLinear(nn.Module):
    """float[..., I] -> float[..., O]: the layer's own output and scaling * B @ (A @ x).

    Its tensors bear the names that peft gives them: `base_layer`, `lora_A`, `lora_B`. To who reads
    it as a linear layer, `weight` is both together, made anew at each look.
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

    @property
    def weight(self) -> torch.Tensor:
        """float[O, I]: what merging would make of the base's; the base stays as it is."""
        return merged_weight(self.base_layer.weight, self.lora_A, self.lora_B, self.scaling)

    @property
    def bias(self) -> torch.Tensor | None:
        """float[O], which no adapter changes."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """I."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.base_layer.out_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """float[..., I] -> float[..., O]."""
        change = F.linear(F.linear(input, self.lora_A.to(input.dtype)), self.lora_B.to(input.dtype))
        output: torch.Tensor = self.base_layer(input)
        return output + self.scaling * change


def kept_on_plain_weights(language: LanguageModel) -> bool:
    """Whether every adapter is kept beside a weight in full precision: a copy can hold both.

    True without adapters; False for those in training, which peft puts on.
    """
    kept = [module for module in language.modules() if isinstance(module, AdaptedLinear)]
    if any(isinstance(layer.base_layer, QuantizedLinear) for layer in kept):
        return False
    return len(list(adapter_parameters(language))) == 2 * len(kept)


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
