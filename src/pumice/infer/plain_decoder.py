"""A decoder of the Llama kind with fewer operations per token than transformers' own.

Prompts of different lengths are read side by side without padding; query, key and value, and gate
and up, are one product each; weights lie as inputs by outputs, which a single row reads at about
twice the speed. Before it is used it must agree with transformers on the model at hand.

Used for: llama, mistral, qwen2 and qwen3 without sliding windows, in float32, their linear layers
plain or quantised, without gated cross-attention or hooks, when a copy of the plain weights is at
most 2 GiB. Everything else runs through `decoder.AnyDecoder`.
Shapes: N tokens of all prompts, B rows, H heads, Dh head width, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pumice.infer.cache import BufferCache, BufferLayer
from pumice.infer.decoder import AnyDecoder, Chunk, Decoder
from pumice.models.cross_attention import Media
from pumice.models.lmm import LMM
from pumice.models.lora import has_lora
from pumice.models.quantize import QuantizedLinear

log = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# What turns positions into angles without looking at how long the text is.
_ROPES = ("default", "linear", "llama3", "yarn")
_MOST_BYTES = 2 * 1024**3
_TOLERANCE = 1e-3

Product = Callable[[torch.Tensor], torch.Tensor]


class Dense:
    """Linear layers that read the same input, as one product: float[N, I] -> float[N, sum of O]."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight for layer in layers]).t().contiguous()
        biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return x @ self.weight
        return torch.addmm(self.bias, x, self.weight)


class Quantized:
    """Quantised linear layers that read the same input, their outputs side by side."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = [layer(x) for layer in self.layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Norm:
    """A root-mean-square norm in one operation: float[..., D] -> float[..., D]."""

    def __init__(self, module: Any) -> None:
        self.weight: torch.Tensor = module.weight
        self.shape = self.weight.shape
        self.eps: float = module.variance_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


@dataclass(slots=True)
class _Block:
    norm: Product
    qkv: Product
    out: Product
    feed_norm: Product
    gate_up: Product
    down: Product
    activation: Callable[[torch.Tensor], torch.Tensor]
    scaling: float
    query_norm: Product | None
    key_norm: Product | None


class PlainDecoder:
    """A language model of one of `FAMILIES`; `best_decoder` says whether it can be used."""

    def __init__(self, lmm: LMM) -> None:
        self._embed = lmm.language.embed
        model: Any = lmm.language.model
        config = lmm.language.config
        self._rotary: Any = model.model.rotary_emb
        self._heads = config.num_attention_heads
        self._key_heads = config.num_key_value_heads
        self._blocks = [_block(layer) for layer in model.model.layers]
        self._norm = Norm(model.model.norm)
        self._head = _product([model.lm_head])
        self._cos = self._sin = torch.empty(0)

    def read(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Chunks of different prompts -> float[V] of each that ends."""
        lengths = [len(chunk.embeds) for chunk in chunks]
        places = torch.cat(
            [
                torch.arange(chunk.first, chunk.first + length, device=chunk.embeds.device)
                for chunk, length in zip(chunks, lengths, strict=True)
            ]
        )
        masks = [
            _causal(chunk.first, length, places)
            for chunk, length in zip(chunks, lengths, strict=True)
        ]

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            mixed = []
            parts = [torch.split(part, lengths) for part in (query, key, value)]
            for chunk, mask, q, k, v in zip(chunks, masks, *parts, strict=True):
                known = _layer(chunk.cache, layer)
                keys, values = known.update(
                    k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
                )
                found = self._attention(q.transpose(0, 1).unsqueeze(0), keys, values, mask, layer)
                mixed.append(found[0].transpose(0, 1).flatten(1))
            return torch.cat(mixed)

        hidden = self._through(torch.cat([chunk.embeds for chunk in chunks]), places, attend)
        ends = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        wanted = [place for place, chunk in enumerate(chunks) if chunk.ends]
        if not wanted:
            return []
        return list(self._head(self._norm(hidden[ends[wanted]])))

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        padding: Sequence[int],
        cache: BufferCache,
        media: Media | None,
    ) -> torch.Tensor:
        """long[B] tokens and their long[B] positions -> float[B, V]."""
        mask = None
        if any(padding):
            columns = torch.arange(cache.width + 1, device=tokens.device)
            hidden_columns = columns < torch.tensor(padding, device=tokens.device).unsqueeze(1)
            mask = torch.zeros(hidden_columns.shape, device=tokens.device)
            mask = mask.masked_fill_(hidden_columns, float("-inf"))[:, None, None]

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            keys, values = cache.layers[layer].update(key.unsqueeze(2), value.unsqueeze(2))
            return self._attention(query.unsqueeze(2), keys, values, mask, layer).flatten(1)

        hidden = self._through(self._embed(tokens), positions, attend)
        return self._head(self._norm(hidden))

    def _through(
        self, hidden: torch.Tensor, places: torch.Tensor, attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """float[N, D], long[N] -> float[N, D], through all blocks."""
        cos, sin = self._angles(places)
        heads, key_heads = self._heads, self._key_heads
        for number, block in enumerate(self._blocks):
            states = block.qkv(block.norm(hidden)).view(len(hidden), heads + 2 * key_heads, -1)
            if block.query_norm is not None and block.key_norm is not None:
                query, key, value = torch.split(states, [heads, key_heads, key_heads], 1)
                states = torch.cat([block.query_norm(query), block.key_norm(key), value], 1)
            turned = states[:, : heads + key_heads]
            half = turned.shape[-1] // 2
            turned = torch.addcmul(turned * cos, turned.roll(half, -1), sin)
            query, key = torch.split(turned, [heads, key_heads], 1)
            mixed = attend(number, query, key, states[:, heads + key_heads :])
            hidden = hidden + block.out(mixed)
            gate, up = block.gate_up(block.feed_norm(hidden)).chunk(2, -1)
            hidden = hidden + block.down(block.activation(gate) * up)
        return hidden

    def _attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        layer: int,
    ) -> torch.Tensor:
        """float[B, H, T, Dh], float[B, Hk, S, Dh] twice -> float[B, H, T, Dh]."""
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            mask,
            scale=self._blocks[layer].scaling,
            enable_gqa=self._heads != self._key_heads,
        )

    def _angles(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """long[N] -> cosines and signed sines, float[N, 1, Dh] each."""
        needed = int(places.max()) + 1
        if needed > len(self._cos):
            every = torch.arange(max(needed, 2 * len(self._cos), 256), device=places.device)
            cos, sin = self._rotary(self._embed(every[:1]), every.unsqueeze(0))
            half = sin.shape[-1] // 2
            self._cos, self._sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        return self._cos[places].unsqueeze(1), self._sin[places].unsqueeze(1)


@torch.no_grad()
def best_decoder(lmm: LMM) -> Decoder:
    """The decoder that is fastest for this model and computes what transformers computes."""
    plain = AnyDecoder(lmm)
    if not _fits(lmm):
        return plain
    fast = PlainDecoder(lmm)
    apart = _difference(lmm, plain, fast)
    if not apart < _TOLERANCE:
        log.warning(
            "the language model (%s) does not compute what its family does (logits are %.2g apart, "
            "relative to the largest); transformers' own code is used.",
            lmm.language.config.model_type,
            apart,
        )
        return plain
    return fast


def _fits(lmm: LMM) -> bool:
    language, config = lmm.language, lmm.language.config
    if lmm.cross_attention is not None or config.model_type not in FAMILIES:
        return False
    windows = getattr(config, "use_sliding_window", True) and getattr(
        config, "sliding_window", None
    )
    if windows or lmm.dtype != torch.float32:
        return False
    if config.rope_parameters.get("rope_type", "default") not in _ROPES:
        return False
    modules = list(language.model.modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return False  # someone listens to, or changes, what the blocks say
    if has_lora(language):
        return False  # the changes of adapters stand beside the weights, not in them
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if any(type(m) not in (nn.Linear, QuantizedLinear) for m in linears):
        return False
    copied = sum(m.weight.numel() * 4 for m in linears if type(m) is nn.Linear)
    return copied <= _MOST_BYTES and len(linears) == 7 * config.num_hidden_layers + 1


@torch.inference_mode()
def _difference(lmm: LMM, one: Decoder, other: Decoder) -> float:
    """How far logits are apart, relative to the largest: two prompts read, then a step of both."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, lmm.language.vocab_size, (14,), generator=draw).to(lmm.device)
    found = []
    for decoder in (one, other):
        caches = BufferCache(), BufferCache()
        parts = torch.split(lmm.language.embed(ids[:12]), [7, 5])
        chunks = [
            Chunk(part, 0, cache, None, True) for part, cache in zip(parts, caches, strict=True)
        ]
        logits = decoder.read(chunks)
        together = BufferCache()
        together.join(caches[0], 7)
        together.join(caches[1], 5)
        places = torch.tensor([7, 5], device=lmm.device)
        logits += list(decoder.step(ids[12:], places, [0, 2], together, None))
        found.append(torch.stack(logits))
    return float((found[0] - found[1]).abs().max() / found[0].abs().max().clamp(min=1e-30))


def _block(layer: Any) -> _Block:
    attention, feed = layer.self_attn, layer.mlp
    return _Block(
        norm=Norm(layer.input_layernorm),
        qkv=_product([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=_product([attention.o_proj]),
        feed_norm=Norm(layer.post_attention_layernorm),
        gate_up=_product([feed.gate_proj, feed.up_proj]),
        down=_product([feed.down_proj]),
        activation=feed.act_fn,
        scaling=attention.scaling,
        query_norm=Norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=Norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
    )


def _product(layers: Sequence[nn.Linear]) -> Product:
    return Quantized(layers) if isinstance(layers[0], QuantizedLinear) else Dense(layers)


def _layer(cache: BufferCache, number: int) -> BufferLayer:
    while len(cache.layers) <= number:
        cache.layers.append(BufferLayer())
    return cache.layers[number]


def _causal(first: int, length: int, like: torch.Tensor) -> torch.Tensor | None:
    """bool[T, first + T], which earlier positions each position of a chunk sees; None for all."""
    if length == 1:
        return None
    every = torch.ones(length, first + length, dtype=torch.bool, device=like.device)
    return every.tril(first)
