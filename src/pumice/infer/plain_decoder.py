"""A decoder of the Llama kind with fewer operations per token than transformers' own.

Prompts of different lengths are read side by side without padding; query, key and value, and gate
and up, are one product each (`products.py`); the last block goes on with those positions alone
whose logits are wanted. Before it is used it must agree with transformers on the model at hand.

Used for: llama, mistral, qwen2 and qwen3 without sliding windows, in float32, their linear layers
plain or quantised, without gated cross-attention or hooks, when the copies of plain weights are at
most 4 GiB. Everything else runs through `decoder.AnyDecoder`.
Shapes: N tokens of all prompts, B rows, T positions, S columns, H heads, Hk key heads, Dh head
width, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from pumice.infer.attending import Attending, OneByOne, SideBySide, attention, keep
from pumice.infer.cache import StackedCache
from pumice.infer.decoder import AnyDecoder, Chunk, Decoder
from pumice.infer.one_row import OneRow
from pumice.infer.pages import Pages
from pumice.infer.plain_blocks import Block, block_of
from pumice.infer.products import Norm, product
from pumice.models.cross_attention import Media
from pumice.models.live_adapter import kept_on_plain_weights
from pumice.models.lmm import LMM
from pumice.models.quantize import QuantizedLinear

log = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# What turns positions into angles without looking at how long the text is.
_ROPES = ("default", "linear", "llama3", "yarn")
_MOST_BYTES = 4 * 1024**3
_TOLERANCE = 1e-3
# Caches lie side by side when padding them to the longest adds no more than this factor.
_MOST_PADDED = 1.25


class PlainDecoder:
    """A language model of one of `FAMILIES`; `best_decoder` says whether it can be used."""

    def __init__(self, lmm: LMM) -> None:
        model: Any = lmm.language.model
        config = lmm.language.config
        self._table = lmm.language.token_embeddings.detach()
        self._rotary: Any = model.model.rotary_emb
        self._heads: int = config.num_attention_heads
        self._key_heads: int = config.num_key_value_heads
        copies = _copied_bytes(lmm.language.model) <= _MOST_BYTES
        pages = Pages()
        self._blocks = [block_of(layer, pages, copies) for layer in model.model.layers]
        self._norm = Norm(model.model.norm)
        self._head = product([model.lm_head], pages, copies=copies)
        self._width: int = model.model.layers[0].self_attn.head_dim
        self._like = self._table.new_empty(self._key_heads, 0, self._width)
        self._turns = torch.empty(0)
        self._one: OneRow | None = None
        if self._table.device.type == "cpu" and config.hidden_act == "silu":
            heads = self._heads, self._key_heads
            read = _plain_bytes(lmm.language.model)
            self._one = OneRow(self._blocks, self._norm, self._head, heads, read)
            self._rows = self._table.numpy()

    def at_work(self) -> AbstractContextManager[object]:
        """The threads of numpy's products, where a row alone is computed by it."""
        return nullcontext() if self._one is None else self._one.at_work()

    def cache(self, columns: int | None = None) -> StackedCache:
        """An empty cache for this decoder; with `columns` for one row that will have so many."""
        return StackedCache(len(self._blocks), self._like, columns)

    def caches(self, columns: Sequence[int]) -> list[StackedCache]:
        """Empty caches of one row each, side by side where they are of about the same length."""
        if len(columns) > 1 and max(columns) * len(columns) <= _MOST_PADDED * sum(columns):
            return StackedCache.side_by_side(len(self._blocks), self._like, columns)
        return [self.cache(count) for count in columns]

    def read(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Chunks of different prompts -> float[V] of each that ends."""
        lengths = [len(chunk.embeds) for chunk in chunks]
        device = self._table.device
        spans = [(c.first, c.first + count) for c, count in zip(chunks, lengths, strict=True)]
        places = torch.cat([torch.arange(*span) for span in spans]).to(device)
        turns = self._turns_at(places, max(last for _, last in spans))
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        wanted = ends[[place for place, chunk in enumerate(chunks) if chunk.ends]]
        attend = self._attending(chunks)
        hidden = torch.cat([chunk.embeds for chunk in chunks])
        for layer, block in enumerate(self._blocks):
            states = self._states(block, hidden, turns)
            # Of the last block's positions none but those whose logits are wanted go on.
            last = layer == len(self._blocks) - 1
            mixed = attend(layer, states, block.scaling, last)
            if last:
                hidden = hidden[wanted]
            if len(mixed):
                hidden = self._after(block, hidden, mixed)
        return list(self._head(self._norm(hidden))) if len(wanted) else []

    def step(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        cache: StackedCache,
        media: Media | None,
    ) -> torch.Tensor:
        """B tokens, and how many positions each row has before them -> float[B, V]."""
        if self._one is not None and len(tokens) == 1:
            turns = self._turns_at(lengths[0], lengths[0] + 1)
            logits = self._one(self._rows[tokens[0]], turns.numpy(), cache.grow_row())
            return torch.from_numpy(logits).unsqueeze(0)
        ids, places = torch.tensor([tokens, lengths], device=self._table.device)
        longest = max(lengths)
        turns = self._turns_at(places, longest + 1)
        mask = None
        if min(lengths) < longest:
            columns = torch.arange(longest + 1, device=places.device)
            mask = torch.zeros(len(tokens), longest + 1, device=places.device)
            mask.masked_fill_(columns < (longest - places).unsqueeze(1), float("-inf"))
            mask = mask[:, None, None]
        fresh, known = cache.grow(1, len(tokens))
        hidden = self._table[ids]
        for layer, block in enumerate(self._blocks):
            states = self._states(block, hidden, turns).unsqueeze(1)
            keep(states, fresh[layer], self._heads)
            mixed = attention(states, known[layer], self._heads, block.scaling, mask)
            hidden = self._after(block, hidden, mixed.squeeze(1))
        return self._head(self._norm(hidden))

    def _states(self, block: Block, hidden: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """float[N, D] -> float[N, H + 2 Hk, Dh]: queries, keys and values; the former turned."""
        turned = self._heads + self._key_heads
        states = block.qkv(block.norm(hidden)).view(-1, turned + self._key_heads, self._width)
        if block.query_norm is not None and block.key_norm is not None:
            query, key, value = torch.split(
                states, [self._heads, self._key_heads, self._key_heads], 1
            )
            states = torch.cat([block.query_norm(query), block.key_norm(key), value], 1)
        pairs = states.view(-1, turned + self._key_heads, self._width // 2, 2)
        torch.view_as_complex(pairs)[:, :turned].mul_(turns)
        return states

    def _attending(self, chunks: Sequence[Chunk]) -> Attending:
        kind = SideBySide if SideBySide.can_hold(chunks) else OneByOne
        return kind(chunks, self._heads)

    def _after(self, block: Block, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """float[N, D], float[N, H Dh] -> float[N, D]: the rest of a block behind its attention."""
        hidden = block.out(mixed, hidden)
        gate, up = block.gate_up(block.feed_norm(hidden)).chunk(2, -1)
        return block.down(block.activation(gate).mul_(up), hidden)

    def _turns_at(self, places: torch.Tensor | int, needed: int) -> torch.Tensor:
        """long[N], all below `needed` -> complex[N, 1, Dh / 2]: cosines, and sines times i.

        Of one place -> complex[1, Dh / 2].
        """
        if needed > len(self._turns):
            count = max(needed, 2 * len(self._turns), 256)
            every = torch.arange(count, device=self._table.device)
            cos, sin = self._rotary(self._table[:1], every.unsqueeze(0))
            half = sin.shape[-1] // 2
            self._turns = torch.complex(cos[0, :, :half], sin[0, :, :half])
        return self._turns[places].unsqueeze(-2)


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
    if not kept_on_plain_weights(language):
        return False  # adapters that no copy of the weights can hold
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if any(type(m) not in (nn.Linear, QuantizedLinear) for m in linears):
        return False
    if _plain_bytes(language.model) and _copied_bytes(language.model) > _MOST_BYTES:
        return False
    wanted: int = 7 * config.num_hidden_layers + 1
    return len(linears) == wanted


def _plain_bytes(model: nn.Module) -> int:
    """What the weights of its linear layers take that are not quantised."""
    return sum(m.weight.nbytes for m in model.modules() if type(m) is nn.Linear)


def _copied_bytes(model: nn.Module) -> int:
    """What copies of its linear layers take: two in float32, or two in 8 bits."""
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    eight = sum(2 * layer.in_features * layer.out_features for layer in quantized)
    return 2 * _plain_bytes(model) + eight


@torch.inference_mode()
def _difference(lmm: LMM, one: Decoder, other: Decoder) -> float:
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
        together = decoder.cache()
        together.join(caches[0], 7)
        together.join(caches[1], 5)
        logits += list(decoder.step(ids[12:].tolist(), [7, 5], together, None))
        logits += list(decoder.step(ids[12:13].tolist(), [7], caches[0], None))
        found.append(torch.stack(logits))
    return float((found[0] - found[1]).abs().max() / found[0].abs().max().clamp(min=1e-30))
