"""Reading prompts and saying the next token, with the language model as transformers has it.

Shapes: B rows, T positions of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pumice.infer.cache import BatchCache, BufferCache, PromptCache
from pumice.models.cross_attention import Media
from pumice.models.lmm import LMM


@dataclass(slots=True)
class Chunk:
    """The next positions of one prompt."""

    embeds: torch.Tensor
    """float[T, D]"""
    first: int
    """The position of the first of them: as many stand in `cache` already."""
    cache: Any
    """Of one row, from the decoder that reads; the keys and values of the chunk are appended."""
    media: Media | None
    """What gated layers look at from these positions."""
    ends: bool
    """Whether the prompt ends here, so that the logits of its last position are wanted."""


class Decoder(Protocol):
    """How the engine runs a language model."""

    def at_work(self) -> AbstractContextManager[object]:
        """What a thread holds while it reads and steps; without it, that may be slower."""

    def cache(self) -> BatchCache:
        """An empty cache for rows in flight."""

    def caches(self, columns: Sequence[int]) -> Sequence[PromptCache]:
        """Empty caches of one row each, which will have so many columns."""

    def read(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Chunks of different prompts -> float[V] of each that ends."""

    def step(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        cache: Any,
        media: Media | None,
    ) -> torch.Tensor:
        """B tokens, and how many positions each row has before them -> float[B, V]."""


class AnyDecoder:
    """Any decoder of transformers, through its own forward pass; prompts one after the other."""

    def __init__(self, lmm: LMM) -> None:
        self._lmm = lmm

    def at_work(self) -> AbstractContextManager[object]:
        """Nothing: torch's threads are set already."""
        return nullcontext()

    def cache(self) -> BufferCache:
        """An empty cache, as transformers' decoders take it."""
        return BufferCache()

    def caches(self, columns: Sequence[int]) -> list[BufferCache]:
        """As many of them."""
        return [BufferCache() for _ in columns]

    def read(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Chunks of different prompts -> float[V] of each that ends."""
        ends = []
        for chunk in chunks:
            length = len(chunk.embeds)
            keep = torch.zeros(1, length, dtype=torch.bool, device=chunk.embeds.device)
            keep[0, -1] = True
            places = torch.arange(chunk.first, chunk.first + length, device=chunk.embeds.device)
            with self._lmm.looking_at(chunk.media):
                logits: torch.Tensor = self._lmm.language(
                    chunk.embeds.unsqueeze(0),
                    position_ids=places.unsqueeze(0),
                    cache=chunk.cache,
                    keep=keep,
                )
            if chunk.ends:
                ends.append(logits[0])
        return ends

    def step(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        cache: Any,
        media: Media | None,
    ) -> torch.Tensor:
        """B tokens, and how many positions each row has before them -> float[B, V]."""
        language = self._lmm.language
        ids, places = torch.tensor([tokens, lengths], device=self._lmm.device)
        mask = None
        if min(lengths) < cache.width:
            columns = torch.arange(cache.width + 1, device=ids.device)
            mask = columns >= (cache.width - places).unsqueeze(1)
        with self._lmm.looking_at(media):
            logits: torch.Tensor = language(
                language.embed(ids.unsqueeze(1)),
                position_ids=places.unsqueeze(1),
                attention_mask=mask,
                cache=cache,
            )
        return logits[:, -1]
