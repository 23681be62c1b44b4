"""Which decoder runs a language model: the fastest that computes what transformers computes.

Two are made for the families below: `PlainDecoder` on the CPU in float32, `SlotDecoder` on a GPU,
in half precision, and compiled. Everything else runs through transformers' own code.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.infer.decoder import AnyDecoder, Chunk, Decoder
from pumice.infer.plain_blocks import MOST_COPIED, copied_bytes, plain_bytes
from pumice.infer.plain_decoder import PlainDecoder
from pumice.infer.slot_decoder import SlotDecoder
from pumice.models.compiled import check_compiler
from pumice.models.live_adapter import kept_on_plain_weights
from pumice.models.lmm import LMM
from pumice.models.lora import adapter_parameters
from pumice.models.quantize import QuantizedLinear

log = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# What turns positions into angles without looking at how long the text is.
_ROPES = ("default", "linear", "llama3", "yarn")
# How far logits may be apart, relative to the largest. In half precision two orders of the same
# sums are 1e-2 apart at 8 blocks and 2e-2 at 32, and what is wrong comes out far from it.
_TOLERANCE = 1e-3
_HALF_TOLERANCE = 1e-1


@torch.no_grad()
def best_decoder(lmm: LMM, *, compiled: bool = False) -> Decoder:
    """The fastest decoder for this model; with `compiled`, its steps go through torch.compile.

    Raises PumiceError where nothing can be compiled.
    """
    usual = AnyDecoder(lmm)
    if compiled:
        check_compiler(lmm.device.type)
    plain = lmm.device.type == "cpu" and lmm.dtype == torch.float32 and not compiled
    against = _unlike(lmm) or (_uncopied(lmm) if plain else _unshared(lmm))
    if against and compiled:
        raise PumiceError(
            f"compile is asked for, and this language model cannot be compiled: it has {against}. "
            f"Allowed are {', '.join(FAMILIES)} without sliding windows, gated layers or adapters "
            f"kept beside them, in full precision or, on a GPU, in int8. Leave compile out."
        )
    if against:
        return usual
    fast = PlainDecoder(lmm) if plain else SlotDecoder(lmm, compiled=compiled)
    apart = logits_apart(lmm, usual, fast)
    if not apart < (_TOLERANCE if lmm.dtype == torch.float32 else _HALF_TOLERANCE):
        log.warning(
            "the language model (%s) does not compute what its family does (logits are %.2g apart, "
            "relative to the largest); transformers' own code is used.",
            lmm.language.config.model_type,
            apart,
        )
        return usual
    if isinstance(fast, SlotDecoder) and compiled:
        fast.try_shapes()
    return fast


def _unlike(lmm: LMM) -> str:
    """What its blocks have that those of the families have not, or what takes part in them."""
    language, config = lmm.language, lmm.language.config
    if lmm.cross_attention is not None:
        return "gated layers"
    if config.model_type not in FAMILIES:
        return f"the blocks of another family, {config.model_type}"
    windows = getattr(config, "use_sliding_window", True)
    if windows and getattr(config, "sliding_window", None):
        return "sliding windows"
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in _ROPES:
        return f"positions of another kind, {rope}"
    modules = list(language.model.modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "hooks that listen to its blocks, or change what they say"
    linears = _linears(lmm)
    wanted: int = 7 * config.num_hidden_layers + 1
    known = all(type(layer) in (nn.Linear, QuantizedLinear) for layer in linears)
    return "" if known and len(linears) == wanted else "linear layers of another kind"


def _uncopied(lmm: LMM) -> str:
    """What copies of the weights cannot hold, or are too large for."""
    model = lmm.language.model
    if not kept_on_plain_weights(lmm.language):
        return "adapters beside its weights"
    small = not plain_bytes(model) or copied_bytes(model) <= MOST_COPIED
    return "" if small else "weights too large to copy"


def _unshared(lmm: LMM) -> str:
    """What keeps its weights from being joined: they must be whole, here, and plain or int8."""
    if any(True for _ in adapter_parameters(lmm.language)):
        return "adapters beside its weights"
    layers, weights = _linears(lmm), lmm.language.parameters()
    if any(type(weight) is not nn.Parameter or weight.device != lmm.device for weight in weights):
        return "weights on several devices, or in parts on several processes"
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if any(layer.method != "int8" for layer in quantized):
        return "int4 weights"
    if any(layer.packed for layer in quantized):
        return "int8 weights in the CPU's order"
    # Layers become one where they read the same input: all are quantised, or none but the head.
    blocks, head = layers[:-1], layers[-1]
    alike = len({type(layer) for layer in blocks}) == 1 and type(head) is nn.Linear
    return "" if alike else "weights of which some are quantised"


def _linears(lmm: LMM) -> list[nn.Linear]:
    """The linear layers of the decoder, its output head last."""
    return [module for module in lmm.language.model.modules() if isinstance(module, nn.Linear)]


@torch.inference_mode()
def logits_apart(lmm: LMM, one: Decoder, other: Decoder) -> float:
    """How far logits are apart, relative to the largest: two prompts read, a step of both
    together, and of one alone.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, lmm.language.vocab_size, (14,), generator=draw).to(lmm.device)
    found = []
    for decoder in (one, other):
        caches = decoder.caches([7, 5])
        parts = torch.split(lmm.language.embed(ids[:12]), [7, 5])
        chunks = [
            Chunk(part, 0, cache, None, True) for part, cache in zip(parts, caches, strict=True)
        ]
        logits = decoder.read(chunks)
        together, alone = decoder.cache(), decoder.cache()
        together.join(caches[0], 7)
        together.join(caches[1], 5)
        alone.join(caches[0], 7)
        logits += list(decoder.step(ids[12:].tolist(), [7, 5], together, None))
        logits += list(decoder.step(ids[12:13].tolist(), [7], alone, None))
        found.append(torch.stack(logits).float())
    return float((found[0] - found[1]).abs().max() / found[0].abs().max().clamp(min=1e-30))
