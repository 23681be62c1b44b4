"""A decoder of the Llama kind with fewer operations per token than transformers' own.

Prompts of different lengths are read side by side without padding; query, key and value, and gate
and up, are one product each (`products.py`); the last block goes on with those positions alone
whose logits are wanted. Before it is used it must agree with transformers on the model at hand.

Made for the CPU in float32; `best_decoder.py` says of which models.
Shapes: N tokens of all prompts, B rows, T positions, S columns, H heads, Hk key heads, Dh head
width, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pumice.infer.attending import Attending, OneByOne, SideBySide, attention, keep
from pumice.infer.cache import StackedCache
from pumice.infer.decoder import Chunk
from pumice.infer.one_row import OneRow
from pumice.infer.pages import Pages
from pumice.infer.plain_blocks import MOST_COPIED, Block, block_of, copied_bytes, plain_bytes
from pumice.infer.products import Norm, product
from pumice.models.cross_attention import Media
from pumice.models.lmm import LMM

# Caches lie side by side when padding them to the longest adds no more than this factor.
_MOST_PADDED = 1.25


class PlainDecoder:
    """A language model of one of the families; `best_decoder` says whether it can be used."""

    def __init__(self, lmm: LMM) -> None:
        model: Any = lmm.language.model
        config = lmm.language.config
        self._table = lmm.language.token_embeddings.detach()
        self._rotary: Any = model.model.rotary_emb
        self._heads: int = config.num_attention_heads
        self._key_heads: int = config.num_key_value_heads
        copies = copied_bytes(lmm.language.model) <= MOST_COPIED
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
            read = plain_bytes(lmm.language.model)
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
