"""How the positions of several prompts, read at once, look at what stands before them.

Shapes: C chunks of N positions together, T of one of them, S columns, B rows, H heads, Hk key
heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional as F

from pumice.infer.cache import StackedCache
from pumice.infer.decoder import Chunk

# Longer chunks are cut, so that no position is multiplied with more than so many later keys: torch
# computes the masked half of a square as well.
_CUT = 64


class Attending(Protocol):
    """The attention of one layer after the other over the same chunks."""

    def __call__(
        self, layer: int, states: torch.Tensor, scaling: float, last: bool
    ) -> torch.Tensor:
        """float[N, H + 2 Hk, Dh] -> float[N, H Dh]; the keys and values are kept.

        With `last` -> float[K, H Dh], of the last position of each chunk that ends its prompt.
        """


class OneByOne:
    """Chunk by chunk."""

    def __init__(self, chunks: Sequence[Chunk], heads: int) -> None:
        self._heads = heads
        self._chunks = chunks
        self._lengths = [len(chunk.embeds) for chunk in chunks]
        self._room = [c.cache.grow(n, 1) for c, n in zip(chunks, self._lengths, strict=True)]
        cut = max(min(length, _CUT) for length in self._lengths)
        before = (
            c.first + (n - 1) // _CUT * _CUT for c, n in zip(chunks, self._lengths, strict=True)
        )
        self._before = max(before)
        # float[cut, S + cut]: of the last columns, a cut's own, those that come later are unseen.
        later = chunks[0].embeds.new_full((cut, cut), float("-inf")).triu_(1)
        self._mask = F.pad(later, (self._before, 0))

    def __call__(
        self, layer: int, states: torch.Tensor, scaling: float, last: bool
    ) -> torch.Tensor:
        """float[N, H + 2 Hk, Dh] -> float[N, H Dh], or float[K, H Dh]."""
        mixed = [states.new_empty(0, self._heads * states.shape[-1])]
        parts = torch.split(states, self._lengths)
        for chunk, (fresh, known), part in zip(self._chunks, self._room, parts, strict=True):
            part = part.unsqueeze(0)
            keep(part, fresh[layer], self._heads)
            if not last:
                mixed += self._cut(chunk.first, part, known[layer], scaling)
            elif chunk.ends:
                mixed.append(attention(part[:, -1:], known[layer], self._heads, scaling, None)[0])
        return torch.cat(mixed)

    def _cut(
        self, first: int, states: torch.Tensor, known: torch.Tensor, scaling: float
    ) -> list[torch.Tensor]:
        """float[1, T, H + 2 Hk, Dh], float[2, 1, Hk, S, Dh] -> pieces of float[T, H Dh]."""
        found = []
        for start in range(0, states.shape[1], _CUT):
            part = states[:, start : start + _CUT]
            length = part.shape[1]
            before = first + start
            mask = self._mask[:length, self._before - before : self._before + length]
            seen = known[..., : before + length, :]
            found.append(attention(part, seen, self._heads, scaling, mask)[0])
        return found


class Whole:
    """Chunk by chunk, each in one operation: on a GPU that is one kernel.

    Query heads that share keys and values are computed as further positions of one head, which
    every kernel can, with a mask too.
    """

    def __init__(self, chunks: Sequence[Chunk], heads: int) -> None:
        self._heads = heads
        self._chunks = chunks
        self._lengths = [len(chunk.embeds) for chunk in chunks]
        self._room = [c.cache.grow(n, 1) for c, n in zip(chunks, self._lengths, strict=True)]
        self._masks = [_later(chunk) if chunk.first else None for chunk in chunks]

    def __call__(
        self, layer: int, states: torch.Tensor, scaling: float, last: bool
    ) -> torch.Tensor:
        """float[N, H + 2 Hk, Dh] -> float[N, H Dh], or float[K, H Dh]."""
        mixed = [states.new_empty(0, self._heads * states.shape[-1])]
        parts = torch.split(states, self._lengths)
        for chunk, (fresh, known), part, mask in zip(
            self._chunks, self._room, parts, self._masks, strict=True
        ):
            keep(part.unsqueeze(0), fresh[layer], self._heads)
            if last:
                if chunk.ends:
                    mixed.append(self._grouped(part[-1:], known[layer], scaling, None))
            elif mask is not None:
                mixed.append(self._grouped(part, known[layer], scaling, mask))
            else:
                mixed.append(self._first(part, known[layer], scaling))
        return torch.cat(mixed)

    def _first(self, part: torch.Tensor, known: torch.Tensor, scaling: float) -> torch.Tensor:
        """float[T, H + 2 Hk, Dh], float[2, 1, Hk, T, Dh] -> float[T, H Dh], from the beginning."""
        query = part[:, : self._heads].transpose(0, 1).unsqueeze(0)
        keys, values = known.unbind(0)
        found = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scaling,
            enable_gqa=self._heads != keys.shape[1],
        )  # fmt: skip
        return found[0].transpose(0, 1).flatten(1)

    def _grouped(
        self, part: torch.Tensor, known: torch.Tensor, scaling: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """float[T, >= H, Dh], float[2, 1, Hk, S, Dh], float[T, S] -> float[T, H Dh]."""
        count, key_heads, width = len(part), known.shape[2], part.shape[-1]
        query = part[:, : self._heads].reshape(count, key_heads, -1, width)
        groups = query.shape[2]
        query = query.permute(1, 2, 0, 3).reshape(1, key_heads, groups * count, width)
        mask = None if mask is None else mask.repeat(groups, 1)
        keys, values = known.unbind(0)
        found = F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
        return found.view(key_heads, groups, count, width).permute(2, 0, 1, 3).flatten(1)


class SideBySide:
    """All chunks in one operation, padded to the longest: of short ones each costs more to call
    than to compute. Their caches lie in one tensor, so that nothing is copied. A chunk's places
    are the last T of them; what is computed for the others is left behind.
    """

    def __init__(self, chunks: Sequence[Chunk], heads: int) -> None:
        self._heads = heads
        lengths = [len(chunk.embeds) for chunk in chunks]
        longest = max(lengths)
        for chunk, length in zip(chunks, lengths, strict=True):
            chunk.cache.grow(length, 1)
        like = chunks[0].embeds
        starts = [chunk.cache.beside.first for chunk in chunks]
        firsts = [start + c.first for start, c in zip(starts, chunks, strict=True)]
        ends = [first + length for first, length in zip(firsts, lengths, strict=True)]
        numbers = torch.tensor([starts, ends, lengths], device=like.device)
        start, end, length = numbers.unsqueeze(-1)
        self._ends = numbers[2].cumsum(0) - 1
        behind = torch.arange(1 - longest, 1, device=like.device)
        own = behind > -length
        # Where each position stands among the padded ones, and where each of those comes from.
        self._places = own.flatten().nonzero().squeeze(1)
        self._sources = (self._ends.unsqueeze(1) + behind * own).flatten()
        at = end - 1 + behind
        self._row, self._column = own.nonzero(as_tuple=True)[0], at[own]
        columns = torch.arange(max(ends), device=like.device)
        unseen = (columns > at.unsqueeze(-1)) | (columns < start.unsqueeze(-1))
        self._mask = like.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf")).unsqueeze(1)
        self._ending = [place for place, chunk in enumerate(chunks) if chunk.ends]
        self._known = chunks[0].cache.beside.every[..., : len(columns), :]
        for row, last in enumerate(ends):
            if last < len(columns):
                # What is masked is still multiplied by zero.
                self._known[:, :, row, :, last:] = 0
        # Whether all may be kept as they are padded: over nothing but columns of no one.
        self._alike = min(ends) == max(ends) and all(
            chunk.first == 0 or count == longest
            for chunk, count in zip(chunks, lengths, strict=True)
        )

    @staticmethod
    def can_hold(chunks: Sequence[Chunk]) -> bool:
        """Whether these are all rows of one tensor, and short."""
        if len(chunks) < 2 or not StackedCache.whole([chunk.cache for chunk in chunks]):
            return False
        lengths = [len(chunk.embeds) for chunk in chunks]
        return max(lengths) <= _CUT and max(lengths) * len(lengths) <= 2 * sum(lengths)

    def __call__(
        self, layer: int, states: torch.Tensor, scaling: float, last: bool
    ) -> torch.Tensor:
        """float[N, H + 2 Hk, Dh] -> float[N, H Dh], or float[K, H Dh]."""
        known = self._known[layer]
        rows, new = self._mask.shape[0], self._mask.shape[2]
        padded = states.flatten(1).index_select(0, self._sources).view(rows, new, *states.shape[1:])
        if self._alike:
            keep(padded, known[..., -new:, :], self._heads)
        else:
            both = states[:, self._heads :].reshape(len(states), 2, -1, states.shape[-1])
            known.permute(1, 3, 0, 2, 4)[self._row, self._column] = both
        if last:
            mask = self._mask[:, :, -1:]
            return attention(padded[:, -1:], known, self._heads, scaling, mask)[self._ending, 0]
        found = attention(padded, known, self._heads, scaling, self._mask)
        return found.flatten(0, 1).index_select(0, self._places)


def _later(chunk: Chunk) -> torch.Tensor:
    """float[T, S], to be added to scores: of S columns the last T are the chunk's own."""
    count = len(chunk.embeds)
    later = chunk.embeds.new_full((count, chunk.first + count), float("-inf"))
    return later.triu_(chunk.first + 1)


def keep(states: torch.Tensor, fresh: torch.Tensor, heads: int) -> None:
    """float[B, T, H + 2 Hk, Dh] -> keys and values into float[2, B, Hk, T, Dh]."""
    rows, new, every, width = states.shape
    both = states[:, :, heads:].reshape(rows, new, 2, (every - heads) // 2, width)
    fresh.copy_(both.permute(2, 0, 3, 1, 4))


def attention(
    states: torch.Tensor,
    known: torch.Tensor,
    heads: int,
    scaling: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """float[B, T, >= H, Dh], float[2, B, Hk, S, Dh] -> float[B, T, H Dh]."""
    keys, values = known.unbind(0)
    found = F.scaled_dot_product_attention(
        states[:, :, :heads].transpose(1, 2),
        keys,
        values,
        mask,
        scale=scaling,
        enable_gqa=heads != keys.shape[1],
    )
    return found.transpose(1, 2).flatten(2)
