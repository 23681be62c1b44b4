"""Rows in flight: prefill once, then one token per row and step; finished rows leave.

Rows are padded on the left, so that all write to the same cache column and sliding windows keep
their meaning. Shapes: B rows, T prompt positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pumice.infer.answer import Answer
from pumice.infer.cache import BufferCache
from pumice.infer.sampling import Sampler, choose
from pumice.models.lmm import LMM


@dataclass(slots=True)
class Row:
    """One request on its way."""

    index: int
    """Its place among the requests of the call."""
    prompt: list[int]
    """Ids, with IMAGE_ID at the placeholders."""
    features: list[torch.Tensor]
    """float[Qi, D] of each of its images."""
    sampler: Sampler
    answer: Answer


class Decoding:
    """Answers a batch of rows step by step."""

    def __init__(self, lmm: LMM, rows: Sequence[Row]) -> None:
        self._lmm = lmm
        self.rows = list(rows)
        if not rows:
            return
        self._cache = BufferCache()
        lengths = [len(row.prompt) for row in rows]
        width = max(lengths)
        self._width = width
        self._padding = [width - length for length in lengths]
        ids = [[0] * (width - len(row.prompt)) + row.prompt for row in rows]
        self._ids = torch.tensor(ids, device=lmm.device)
        self._positions = torch.tensor(lengths, device=lmm.device).unsqueeze(1)
        self._mask = self._real_columns(width)

    def run(self) -> Iterator[list[Row]]:
        """After each token the rows that have just finished; ends when all have."""
        if not self.rows:
            return
        logits = self._prefill()
        while True:
            tokens = choose(logits, [row.sampler for row in self.rows])
            done = [row.answer.push(token) for row, token in zip(self.rows, tokens, strict=True)]
            finished = [row for row, over in zip(self.rows, done, strict=True) if over]
            if len(finished) == len(self.rows):
                self.rows = []
                yield finished
                return
            if finished:
                stay = [place for place, over in enumerate(done) if not over]
                self._leave(stay)
                tokens = [tokens[place] for place in stay]
            yield finished
            logits = self._step(tokens)

    @torch.inference_mode()
    def _prefill(self) -> torch.Tensor:
        """() -> float[B, V] at the last position of every prompt."""
        features = [image for row in self.rows for image in row.features]
        columns = torch.arange(self._width, device=self._ids.device)
        padding = torch.tensor(self._padding, device=self._ids.device).unsqueeze(1)
        keep = torch.zeros_like(self._ids, dtype=torch.bool)
        keep[:, -1] = True
        self._media = self._lmm.media(self._ids, features)
        with self._lmm.looking_at(self._media):
            logits: torch.Tensor = self._lmm.language(
                self._lmm.embed(self._ids, features),
                position_ids=(columns - padding).clamp(min=0),
                attention_mask=self._mask,
                cache=self._cache,
                keep=keep,
            )
        # The tokens to come look where the last one of the prompt looks.
        self._media = self._media and self._media.after()
        return logits

    @torch.inference_mode()
    def _step(self, tokens: list[int]) -> torch.Tensor:
        """B tokens -> float[B, V], the logits of the token after them."""
        language = self._lmm.language
        ids = torch.tensor(tokens, device=self._positions.device).unsqueeze(1)
        self._width += 1
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        with self._lmm.looking_at(self._media):
            logits: torch.Tensor = language(
                language.embed(ids),
                position_ids=self._positions,
                attention_mask=self._mask,
                cache=self._cache,
            )
        self._positions = self._positions + 1
        return logits[:, -1]

    @torch.inference_mode()
    def _leave(self, stay: list[int]) -> None:
        self.rows = [self.rows[place] for place in stay]
        self._padding = [self._padding[place] for place in stay]
        # Columns that are padding in every remaining row go too.
        spare = min(self._padding)
        self._padding = [columns - spare for columns in self._padding]
        self._width -= spare
        rows = torch.tensor(stay, device=self._positions.device)
        self._cache.select(rows, spare)
        self._media = self._media and self._media.select(rows)
        self._positions = self._positions[rows]
        self._mask = self._real_columns(self._width)

    def _real_columns(self, width: int) -> torch.Tensor | None:
        if not any(self._padding):
            return None
        padding = torch.tensor(self._padding, device=self._lmm.device).unsqueeze(1)
        return torch.arange(width, device=self._lmm.device) >= padding
