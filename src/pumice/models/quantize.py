"""Weight-only int8 and int4 for a language model's linear layers, over plain torch operations.

Kept as they are: embeddings, norms, the connector and the vision backbone; the output head too,
until `pack_for_cpu` makes the model ready to answer on a CPU.
Shapes: O outputs, I inputs, G groups of one row, M rows of the input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from pumice.core.errors import PumiceError
from pumice.core.registry import suggest
from pumice.models.language import LanguageModel

Method = Literal["int8", "int4"]
METHODS: tuple[Method, ...] = get_args(Method)
GROUPS = (128, 64, 32)

# One int8 holds an input to 1 in 127; a second one holds what is left over to 1 in 254 of that.
_INT8 = 127
_REST = 254
# FBGEMM's digits have 7 bits: without VNNI it adds pairs of products in 16 bits, which 8 overflow.
DIGIT = 63
# How many times the first digit is worth what the second is.
DIGIT_BASE = 2 * DIGIT
_INT4 = 15
_MIDDLE = 8


def check_method(name: str) -> Method:
    """The quantisation method of that name; another name is an error."""
    for method in METHODS:
        if name == method:
            return method
    raise PumiceError(
        f"quantisation {name!r} is unknown; known: {', '.join(METHODS)}.{suggest(name, METHODS)} "
        f"Leave it out to keep the weights as they are."
    )


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is stored in 8 or 4 bits; gradients reach its input only.

    It is an `nn.Linear`, since that is what adapters are put on. int8 keeps one scale per output,
    int4 one scale and one middle per group of inputs; `fill` gives it its weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        method: Method,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.method = in_features, out_features, method
        group = in_features if method == "int8" else _group_size(in_features)
        self.group = group
        self.packed = False
        columns = in_features if method == "int8" else in_features // 2
        kind = torch.int8 if method == "int8" else torch.uint8
        self.register_buffer(
            "weight", torch.empty(out_features, columns, dtype=kind, device=device)
        )
        if method == "int8":
            scale = torch.empty(out_features, dtype=torch.float32, device=device)
        else:
            # Scale and middle of each group, in the layout of torch's own int4 product.
            shape = (in_features // group, out_features, 2)
            scale = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.register_buffer("scale", scale)
        self.scale: torch.Tensor
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """float[O, I] (+ float[O]) -> quantised and kept; the layer moves to where they are."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise PumiceError(
                f"a weight of shape {tuple(weight.shape)} does not fit a quantised layer of "
                f"{self.in_features} inputs and {self.out_features} outputs; give the weight of "
                f"the layer that it replaces."
            )
        quantize = _to_int8 if self.method == "int8" else _to_int4
        self.weight, self.scale = quantize(weight.detach().float(), self.group)
        self.packed = False
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """float[O, I]: the weight that this layer computes with."""
        if self.packed and self.method == "int4":
            raise PumiceError(
                "an int4 layer packed for answering on the CPU cannot be read back, trained or "
                "moved; load the model again without packing it."
            )
        if self.method == "int8":
            return self.codes.to(dtype) * self.scale.to(dtype).unsqueeze(1)
        codes = torch.cat([self.weight & _INT4, self.weight >> 4], dim=1).to(dtype) - _MIDDLE
        groups = codes.view(self.out_features, -1, self.group)
        scale, middle = self.scale.to(dtype).permute(2, 1, 0).unsqueeze(-1)
        return torch.addcmul(middle, groups, scale).reshape(self.out_features, self.in_features)

    @property
    def codes(self) -> torch.Tensor:
        """int8[O, I] of an int8 layer, packed or not."""
        if not self.packed:
            return self.weight
        held: torch.Tensor = torch.ops.quantized.linear_unpack(self._blocks)[0].int_repr()
        return held

    @property
    def packed_int8(self) -> bool:
        """Whether FBGEMM multiplies it."""
        return self.packed and self.method == "int8"

    def pack(self) -> None:
        """Puts the codes into the order of torch's CPU kernels, and holds them in no other.

        For one token, an int8 layer of 512 x 32000 takes 0.6 ms in place of 3.4, an int4 layer of
        2048 x 8192 0.4 ms in place of 59. Nothing happens where such a kernel cannot be used. An
        int4 layer then only answers: it can neither be trained through nor moved elsewhere; an int8
        layer that is moved has its codes back.
        """
        if self.packed or self.weight.device.type != "cpu":
            return
        if self.method == "int4":
            if self.out_features % 16:
                return
            codes = torch.cat([self.weight & _INT4, self.weight >> 4], dim=1).to(torch.int32)
            self.weight = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        else:
            if not _has_fbgemm():
                return
            zeros = torch.zeros(self.out_features, dtype=torch.long)
            with _fbgemm():
                held = torch._make_per_channel_quantized_tensor(
                    self.weight, self.scale.double(), zeros, 0
                )
                self._blocks = torch.ops.quantized.linear_prepack(held, None)
            self.weight = self.weight.new_empty(0, self.in_features)
        self.packed = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """float[..., I] -> float[..., O], in the type of the input (under autocast in its type)."""
        on_cpu = input.device.type == "cpu"
        if torch.is_grad_enabled() and input.requires_grad:
            output: torch.Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        elif on_cpu and self.method == "int8":
            output = self._int8_product(input)
        elif on_cpu and self.packed:
            output = self._int4_product(input)
        else:
            output = F.linear(input, self.dequantized(input.dtype))
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _int8_product(self, input: torch.Tensor) -> torch.Tensor:
        # Two integers carry each input to 4 digits or more, so only the weight's rounding shows,
        # and integer sums do not depend on how many rows are computed together.
        rows = input.reshape(-1, self.in_features).float()
        step = torch.linalg.vector_norm(rows, torch.inf, 1, True)
        step.clamp_(min=1e-30).mul_(1 / (DIGIT if self.packed else _INT8))
        scaled = rows / step
        product = (self._packed_sums if self.packed else self._plain_sums)(scaled).mul_(step)
        return product.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def _packed_sums(self, scaled: torch.Tensor) -> torch.Tensor:
        """float[M, I] within 63 -> float[M, O]."""
        high = scaled.round()
        digits = torch.cat([high, scaled.sub_(high).mul_(DIGIT_BASE)])
        first, second = self.digit_sums(digits).chunk(2)
        product: torch.Tensor = first.add_(second, alpha=1 / DIGIT_BASE)
        return product

    def digit_sums(self, digits: torch.Tensor) -> torch.Tensor:
        """Whole numbers from -63 to 63, float[M, I] -> float[M, O], of a packed int8 layer."""
        sums: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            digits, 1.0, DIGIT + 1, self._blocks
        )
        return sums

    def _plain_sums(self, scaled: torch.Tensor) -> torch.Tensor:
        """float[M, I] within 127 -> float[M, O]."""
        high = scaled.round()
        rest = ((scaled - high) * _REST).round_()
        table = self.weight.t()
        if len(scaled) == 1:
            # Two products of one row are twice as fast as one of two rows.
            sums = [torch._int_mm(part.to(torch.int8), table) for part in (high, rest)]
        else:
            both = torch._int_mm(torch.cat([high, rest]).to(torch.int8), table)
            sums = list(both.chunk(2))
        product: torch.Tensor = sums[0].float().add_(sums[1], alpha=1 / _REST).mul_(self.scale)
        return product

    def _int4_product(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, self.in_features).to(torch.bfloat16)
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, self.group, self.scale
        )
        return product.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves as every module does, but never changes the type of the scales."""
        kind = self.scale.dtype
        if self.packed_int8:
            self.weight, self.packed = self.codes, False
            del self._blocks
        if self.packed and fn(torch.empty(0)).device.type != "cpu":
            raise PumiceError(
                "an int4 model packed for answering on the CPU cannot move to another device; "
                "load it there."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = self.scale.to(kind)
        return self

    def extra_repr(self) -> str:
        """What is shown of the layer."""
        return f"{self.in_features}, {self.out_features}, {self.method}, group={self.group}"


class _Product(torch.autograd.Function):
    """The product with a gradient for the input; nothing but the stored codes is kept for it."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer, ctx.kind = layer, input.dtype
        return F.linear(input, layer.dequantized(_compute_type(input)))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        [grad] = grads
        return (grad @ ctx.layer.dequantized(grad.dtype)).to(ctx.kind), None


def quantize_language(language: LanguageModel, method: Method, *, fill: bool = True) -> None:
    """Replaces the decoder's linear layers, all but its output head, one after the other.

    With `fill=False` they are replaced without weights, and `QuantizedLinear.fill` gives each its
    own as it is read, so that the full-precision model is never in memory as a whole.
    """
    layers = list(_linears(language))
    if not layers:
        raise PumiceError(
            f"the language model ({language.config.model_type}) has no linear layers to quantise; "
            f"decoders built of nn.Linear (Llama, Qwen, Mistral, Phi, Gemma) can be. Load it "
            f"without quantisation."
        )
    for name, layer in layers:
        try:
            fresh = QuantizedLinear(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                method,
                device=layer.weight.device,
            )
        except PumiceError as error:
            raise PumiceError(f"layer {name} cannot be quantised: {error}") from error
        if fill:
            fresh.fill(layer.weight, layer.bias)
        fresh.train(layer.training)
        parent, _, leaf = name.rpartition(".")
        setattr(language.model.get_submodule(parent), leaf, fresh)


def merged(layers: Sequence[QuantizedLinear], order: torch.Tensor) -> QuantizedLinear:
    """int8 layers that read the same input as one; its k-th output is `order[k]` of all of them."""
    first = layers[0]
    biased = first.bias is not None
    one = QuantizedLinear(first.in_features, len(order), biased, "int8", first.scale.device)
    one.weight = torch.cat([layer.codes for layer in layers])[order]
    one.scale = torch.cat([layer.scale for layer in layers])[order]
    if biased:
        bias = torch.cat([layer.bias for layer in layers])[order]
        one.bias = nn.Parameter(bias.detach(), requires_grad=False)
    one.pack()
    return one


def pack_for_cpu(language: LanguageModel) -> None:
    """Makes a quantised language model fast on the CPU; see `QuantizedLinear.pack`.

    Its output head, the largest matrix of a small model, becomes int8 as well. Nothing happens to a
    model in full precision or on another device.
    """
    method = quantized_as(language)
    if method is None or language.device.type != "cpu":
        return
    head = language.model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is nn.Linear:
        biased = head.bias is not None
        made = QuantizedLinear(head.in_features, head.out_features, biased, "int8")
        made.fill(head.weight, head.bias)
        language.model.set_output_embeddings(made.train(head.training))  # type: ignore[operator]
    for layer in quantized_layers(language):
        layer.pack()


def _has_fbgemm() -> bool:
    # torch has said that its quantised tensors will go one day; `_int_mm` is there without them.
    known = hasattr(torch, "_make_per_channel_quantized_tensor")
    return known and "fbgemm" in torch.backends.quantized.supported_engines


@contextmanager
def _fbgemm() -> Iterator[None]:
    """torch packs int8 weights for the engine that is set, for the whole process."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
            yield
    finally:
        torch.backends.quantized.engine = before


def quantized_layers(module: nn.Module) -> list[QuantizedLinear]:
    """The quantised layers in `module`."""
    return [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]


def quantized_as(module: nn.Module) -> Method | None:
    """How the linear layers of `module` are stored; None for full precision."""
    return next((layer.method for layer in quantized_layers(module)), None)


def full_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the full-precision tensors that a model is filled from.

    For a model that is not quantised these are its state dict's, each tied tensor once.
    """
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    aliases -= {name for name, _ in module.named_parameters()}
    state = module.state_dict(keep_vars=True)
    shapes = {name: tuple(state[name].shape) for name in state if name not in aliases}
    for prefix, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear):
            del shapes[f"{prefix}.scale"]
            shapes[f"{prefix}.weight"] = (layer.out_features, layer.in_features)
    return shapes


def _linears(language: LanguageModel) -> Iterator[tuple[str, nn.Linear]]:
    head = language.model.get_output_embeddings()  # type: ignore[operator]
    for name, module in language.model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            if isinstance(module, QuantizedLinear):
                raise PumiceError(
                    f"the language model is quantised already ({module.method}); quantise a model "
                    f"in full precision."
                )
            yield name, module


def _compute_type(input: torch.Tensor) -> torch.dtype:
    kind = input.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype


def _group_size(width: int) -> int:
    for group in GROUPS:
        if width % group == 0:
            return group
    raise PumiceError(
        f"int4 needs a width that {GROUPS[-1]} divides, and it has {width} inputs. Use int8."
    )


def _to_int8(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float[O, I] -> int8[O, I], float[O]."""
    scale = weight.abs().amax(dim=1).clamp_(min=1e-30) / _INT8
    return (weight / scale.unsqueeze(1)).round_().to(torch.int8), scale


def _to_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float[O, I] -> uint8[O, I / 2] (column j beside column j + I / 2), bfloat16[G, O, 2]."""
    groups = weight.view(len(weight), -1, group)
    least, most = groups.amin(dim=-1), groups.amax(dim=-1)
    scale = ((most - least) / _INT4).clamp_(min=1e-30).bfloat16()
    middle = (least + _MIDDLE * scale.float()).bfloat16()
    # Codes are chosen for the rounded scale and middle, which so cost no further error.
    codes = (groups - middle.float().unsqueeze(-1)) / scale.float().unsqueeze(-1) + _MIDDLE
    flat = codes.round_().clamp_(0, _INT4).to(torch.uint8).view(weight.shape)
    low, high = flat.chunk(2, dim=1)
    return low | (high << 4), torch.stack([scale, middle], dim=-1).transpose(0, 1).contiguous()
